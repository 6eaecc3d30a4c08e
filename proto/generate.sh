#!/usr/bin/env bash
# Generates the Python stubs beside the .proto files. With --check: fails when the committed stubs are not what the files say.
set -euo pipefail
cd "$(dirname "$0")"
out=.
if [ "${1:-}" = --check ]; then out=$(mktemp -d); trap 'rm -rf "$out"' EXIT; fi
python -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" mull/v1/*.proto
if [ "$out" = . ]; then
  python generate_sync_client.py
else
  python generate_sync_client.py --check
  for file in "$out"/mull/v1/*; do
    cmp -s "$file" "mull/v1/$(basename "$file")" || { echo "proto/mull/v1/$(basename "$file") is stale: run 'make proto'" >&2; exit 1; }
  done
fi
