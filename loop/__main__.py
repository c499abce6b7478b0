"""`python -m hookloop.loop compare RUN_A RUN_B`: where two runs part; exits with 0 for the same, 1 apart, 2 an error."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m hookloop.loop", description="What looks at runs of hookloop.")
    commands = parser.add_subparsers(dest="command", required=True)
    compare = commands.add_parser("compare", help="name the first update at which two runs part, and what parted first")
    compare.add_argument("run_a", help="the folder of a run's TensorBoard files, written with Fingerprint()")
    compare.add_argument("run_b")
    found = parser.parse_args(arguments)
    try:
        from .study import compare as compare_runs

        parting = compare_runs(found.run_a, found.run_b)
    except (ValueError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(parting)
    return 0 if parting.step is None else 1


if __name__ == "__main__":
    sys.exit(main())
