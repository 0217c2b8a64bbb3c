#!/usr/bin/env bash
# Installs this project on a node, from the checkout that was copied to ~/bruno-ray, into ~/.bruno-ray/venv: with the
# pages that `bruno-ray serve` shows, the Python version of the laptop and the versions of constraints.txt. Safe to run
# again; then it takes a few seconds. Where the image has that Python with that torch, the environment is the image's own,
# and no second torch (3 GB with CUDA's libraries) is downloaded.
set -euo pipefail
cd ~/bruno-ray
venv=~/.bruno-ray/venv
python=$(sed -n 's/.*"python": *"\([0-9.]*\)".*/\1/p' ~/.bruno-ray/laptop_versions.json)
for program in rsync ssh sshd uptime; do
  PATH="$PATH:/usr/sbin" command -v "$program" > /dev/null || missing="${missing:-} $program"
done
if [ -n "${missing:-}" ]; then
  apt-get update -qq && apt-get install -qq -y rsync openssh-client openssh-server procps > /dev/null
fi
command -v uv > /dev/null || python3 -m pip install --quiet --break-system-packages uv || python3 -m pip install --quiet uv
torch=$(sed -n 's/^torch==//p' constraints.txt)
has_both='import sys; from importlib.metadata import version
found = ".".join(map(str, sys.version_info[:2])), version("torch").partition("+")[0]
sys.exit(found != tuple(sys.argv[1:]))'
for own in ${BRUNO_IMAGE_ENVIRONMENTS:-/venv/main /opt/conda}; do
  if [ ! -e "$venv" ] && "$own/bin/python" -c "$has_both" "$python" "$torch" 2> /dev/null; then
    mkdir -p "$(dirname "$venv")"
    ln -s "$own" "$venv"
  fi
done
[ -x "$venv/bin/python" ] || uv venv --quiet --python "$python" "$venv"
uv pip install --quiet --python "$venv/bin/python" -c constraints.txt -e '.[serve]'
