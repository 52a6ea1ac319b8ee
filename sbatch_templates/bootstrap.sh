#!/bin/bash
# Install launcher's agent into a venv below the home folder. Arguments: folder (relative to the
# home), version, folder of wheels. Hosts may share a home: one installs, the others find it done.
set -euo pipefail
folder="$1" version="$2" wheels="$3"
cd
(umask 077 && mkdir -p "$folder")
exec 9>"$folder/lock"
flock -w 300 9 || { echo "another bootstrap holds $folder/lock" >&2; exit 75; }
if [ "$("$folder/venv/bin/python" -m launcher.agent --version 2>/dev/null)" = "$version" ] \
  && [ "$(cat "$folder/wheels.sum" 2>/dev/null)" = "$(cat "$wheels/SUM")" ]; then
  echo "present"
  exit 0
fi
for python in python3.13 python3.12 python3.11 python3; do
  if command -v "$python" >/dev/null \
    && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    break
  fi
  python=""
done
if [ -z "$python" ]; then
  echo "no Python 3.11 or later on $(uname -n)" >&2
  exit 69
fi
rm -rf "$folder/venv.new"
"$python" -m venv "$folder/venv.new" >&2
"$folder/venv.new/bin/python" -m pip install --quiet --disable-pip-version-check --no-index \
  --find-links "$wheels" --no-deps "$wheels"/*.whl >&2
rm -rf "$folder/venv"
mv "$folder/venv.new" "$folder/venv"
found="$("$folder/venv/bin/python" -m launcher.agent --version)"
if [ "$found" != "$version" ]; then
  echo "installed, but it says version $found" >&2
  exit 70
fi
cp "$wheels/SUM" "$folder/wheels.sum"
echo "installed"
