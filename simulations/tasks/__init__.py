"""The built-in tasks: real data that needs no download while a run goes on."""
