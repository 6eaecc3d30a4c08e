#!/usr/bin/env bash
# Lints the .proto files, and fails where a change would break clients of the last landed protocol.
# buf is taken from the PATH, or by npm into .venv/buf; without both the checks are skipped, and a line says so.
set -euo pipefail
cd "$(dirname "$0")"
version=1.75.0
if ! buf=$(command -v buf); then
  buf=../.venv/buf/node_modules/.bin/buf
  if [ ! -x "$buf" ] && command -v npm >/dev/null; then
    npm install --silent --no-save --no-audit --no-fund --prefix ../.venv/buf "@bufbuild/buf@$version" \
      || echo "proto: npm could not install buf $version" >&2
  fi
  if ! "$buf" --version >/dev/null 2>&1; then
    echo "proto: lint and breaking-change check skipped: no buf (install it, or npm)" >&2
    exit 0
  fi
fi
"$buf" lint

# Against main where this is something else, else against the commit before it.
landed=
for branch in main origin/main; do
  if git rev-parse --quiet --verify "$branch" >/dev/null 2>&1; then landed=$branch; break; fi
done
if [ -n "$landed" ] && git diff --quiet "$landed" -- .; then landed=$landed~1; fi
if [ -z "$landed" ] || ! git rev-parse --quiet --verify "$landed" >/dev/null 2>&1; then
  echo "proto: breaking-change check skipped: no landed protocol in this clone (git fetch origin main)" >&2
  exit 0
fi
base=$(mktemp -d)
trap 'rm -rf "$base"' EXIT
git -C .. archive "$landed" proto | tar -x -C "$base"
"$buf" breaking --against "$base/proto"
