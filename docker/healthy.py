"""A container's health, for its HEALTHCHECK: exit code 0 or 1, and one line.

healthy.py URL       does it answer 200?
healthy.py worker    does a worker of this container beat in the search database that CRISM_MLOPS_STORAGE names?
"""

import os
import socket
import sys
import urllib.error
import urllib.request

PATIENCE_S = 8


def answers(url: str) -> str | None:
    """What is wrong with a service, None where it answers 200."""
    # Not through a proxy that the environment may name.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=PATIENCE_S) as response:
            return None if response.status == 200 else f"answered {response.status}"
    except urllib.error.HTTPError as error:
        error.close()
        return f"answered {error.code}"
    except OSError as error:
        return f"no answer: {error}"


def beats(storage: str) -> str | None:
    """What is wrong with this container's worker, None where it beats: see crism_mlops/studies/ledger.py."""
    import psycopg

    host = socket.gethostname()
    query = (
        "select count(*) from crism_workers where split_part(machine, '/', 1) = %s "
        "and expires > extract(epoch from clock_timestamp())"
    )
    try:
        with psycopg.connect(storage.replace("+psycopg", "", 1), connect_timeout=PATIENCE_S) as connection:
            row = connection.execute(query, (host,)).fetchone()
    except psycopg.Error as error:
        return f"search database: {str(error).splitlines()[0]}"
    return None if row is not None and row[0] else f"no worker on {host} beats"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("healthy.py: expected URL or worker")
    what = sys.argv[1]
    wrong = beats(os.environ.get("CRISM_MLOPS_STORAGE", "")) if what == "worker" else answers(what)
    if wrong is not None:
        sys.exit(f"{what}: {wrong}")
    print(f"{what}: healthy")


if __name__ == "__main__":
    main()
