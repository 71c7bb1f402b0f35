"""The container's health check: exit 0 if a URL answers 200 and a TCP port accepts, else 1 with the reason.

Standard library only, so that it starts fast. A server without a model is healthy.
"""

import argparse
import socket
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 2.0


def main(arguments: list[str]) -> int:
    """Check the URL and the port of the command line; return the exit code."""
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
    except (OSError, urllib.error.URLError) as error:
        sys.stderr.write(f"unhealthy: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
