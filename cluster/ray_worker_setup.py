"""What Ray starts for a worker on our own Ray: it becomes the worker at once.

Ray's own script imports all of Ray first, to apply environments of which ours have variables alone.
"""

import argparse
import json
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--serialized-runtime-env-context", type=json.loads, default={})
    parser.add_argument("--language")
    args, worker = parser.parse_known_args()
    variables = args.serialized_runtime_env_context.get("env_vars", {})
    os.execve(sys.executable, [sys.executable, *worker], {**os.environ, **variables})


if __name__ == "__main__":
    main()
