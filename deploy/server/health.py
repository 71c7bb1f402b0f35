"""Exit 0 when a URL answers 200 and a TCP port accepts, else 1 with the reason: the container's health check.

Standard library only, so that it starts in a moment. Refuses to know whether a model is in service.
"""

import argparse
import socket
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 2.0


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.server.health")
    parser.add_argument("--http", help="URL that must answer 200")
    parser.add_argument("--tcp", help="HOST:PORT that must accept a connection")
    options = parser.parse_args(arguments)
    try:
        if options.http:  # no proxy: the check never leaves this machine
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            opener.open(options.http, timeout=TIMEOUT_S).close()
        if options.tcp:
            host, port = options.tcp.rsplit(":", 1)
            socket.create_connection((host, int(port)), TIMEOUT_S).close()
    except (OSError, urllib.error.URLError) as ill:
        sys.stderr.write(f"unhealthy: {ill}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
