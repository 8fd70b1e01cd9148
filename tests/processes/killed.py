"""`mha2mla` with the arguments after the first; killed as it renames a file to a name that ends in that,
or, if that is `NAME:n`, for the nth time; with `NAME:n:SIGINT` by another signal.
"""

import os
import signal
import sys

from mha2mla_vlm.cli.main import main


def kill_at_rename(event, arguments):
    """An audit hook."""
    if event == "os.rename" and str(arguments[1]).endswith(place):
        left.pop()
        if not left:
            os.kill(os.getpid(), signal.Signals[name])


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
    given = sys.argv.pop(1).split(":")
    place, count, name = given + ["", "1", "SIGKILL"][len(given) :]
    left = [None] * int(count)
    sys.addaudithook(kill_at_rename)
    main()
