#!/usr/bin/env bash
# Installs this project on a node, from the checkout that was copied to ~/bruno-ray, into ~/.bruno-ray/venv: with the
# pages that `bruno-ray serve` shows, the Python version of the laptop and the versions of constraints.txt. Safe to run
# again; then it takes a few seconds.
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
[ -x "$venv/bin/python" ] || uv venv --quiet --python "$python" "$venv"
uv pip install --quiet --python "$venv/bin/python" -c constraints.txt -e '.[serve]'
