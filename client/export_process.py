"""The process that makes a device's own files: its command line and input say of what, its output is the files.

Its last line on standard error is why it failed.
"""

from __future__ import annotations

import os
import sys

from propolis.client.opening import Work, files_to
from propolis.secure.errors import PropolisError

EXIT_REFUSED = 2


def main() -> None:
    """Do one work; exit code 2, and a line, where that is not possible."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what a task prints is no answer
    work = Work.of(sys.argv[1], sys.stdin.buffer.read())
    try:
        from propolis.client.own_export import export_here

        files = files_to(export_here(work))
    except PropolisError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    with os.fdopen(answer, "wb") as out:
        out.write(files)


if __name__ == "__main__":
    main()
