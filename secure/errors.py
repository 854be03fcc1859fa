"""Every error that Propolis raises on purpose.

PropolisError
├── UsageError          local misuse: the caller, a file or a flag is wrong; the command line exits with 2
│   └── StorageError    a file could not be written (disk full, no permission); what was there stays whole
├── TooFewPeersError    a round ended with fewer devices than it may
└── CancelledError      the run was asked to stop

A message says what was expected, what came and from whom, in one line.
"""


class PropolisError(Exception):
    """The root of the tree: catch it to catch all of ours."""


class UsageError(PropolisError):
    """The caller asked for something impossible; the message says what to do instead."""


class StorageError(UsageError):
    """A file could not be written; its previous version is untouched."""


class TooFewPeersError(PropolisError):
    """Fewer devices than the configured minimum are connected or survived a round."""


class CancelledError(PropolisError):
    """The run was asked to stop while it waited for devices."""
