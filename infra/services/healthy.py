"""Is a service well? Exit 0 if every address named answers with a 2xx within five seconds, else 1."""

from __future__ import annotations

import sys
import urllib.request


def main() -> int:
    """Ask each address of the command line."""
    # A proxy of the environment is for the outside world.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for address in sys.argv[1:]:
        try:
            opener.open(address, timeout=5).close()
        except OSError as error:
            print(f"{address}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
