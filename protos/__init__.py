"""The wire formats: protobuf definitions and the code generated from them, checked in."""
