"""What a machine does when it has booted: let the cluster in, and end itself when nobody is there any more.

The dead man's switch is for workers whose head is gone: caretaker and autoscaler live there, so nobody else would end
them. Vast.ai gives each container its number and a key that is good for this instance alone (CONTAINER_ID,
CONTAINER_API_KEY). The head touches a file through its tunnel once a minute; without that for `patience_s`, or when the
absolute end has come, the machine destroys itself.
"""

import shlex
from dataclasses import dataclass

from cluster.errors import ClusterSettingsError
from cluster.network.keys import authorize_command

NO_TMUX = "touch ~/.no_auto_tmux"
"""First of all: until this file is there, Vast.ai's shells put every ssh session into tmux and run no command."""

LONGEST = 4096
"""What the API takes."""

LOOK_S = 30

SWITCH = """\
mkdir -p ~/.bruno-ray; touch ~/.bruno-ray/heartbeat
PATIENCE_S={patience} END={end} LOOK_S={look} URL={url} setsid nohup bash -c '
began=$(date +%s); id=${{CONTAINER_ID:-${{VAST_CONTAINERLABEL#C.}}}}
while sleep "$LOOK_S"; do
  now=$(date +%s); beat=$(stat -c %Y ~/.bruno-ray/heartbeat 2>/dev/null || echo "$began")
  if [ $((now - beat)) -ge "$PATIENCE_S" ] || {{ [ "$END" -gt 0 ] && [ "$now" -ge "$END" ]; }}; then
    export ID="$id"
    printf "header = \\"Authorization: Bearer %s\\"" "$CONTAINER_API_KEY" |
      curl -fsS -m 60 -K - -X DELETE -H "Content-Type: application/json" -d "{{}}" "$URL/api/v0/instances/$ID/" ||
      python3 -c "
import os, urllib.request as u
e = os.environ
to = e[\\"URL\\"] + \\"/api/v0/instances/\\" + e[\\"ID\\"] + \\"/\\"
kind = {{\\"Authorization\\": \\"Bearer \\" + e[\\"CONTAINER_API_KEY\\"], \\"Content-Type\\": \\"application/json\\"}}
u.urlopen(u.Request(to, b\\"{{}}\\", kind, method=\\"DELETE\\"), timeout=60)"
  fi
done' > ~/.bruno-ray/switch.log 2>&1 < /dev/null &"""
"""Goes on after a refusal. The key is in no process list. curl is in Vast.ai's images, Python in all that work here."""


@dataclass(frozen=True)
class Switch:
    """When a machine ends itself."""

    url: str
    """Of the API."""
    patience_s: float
    """Without a sign of the head."""
    end: float | None = None
    """Unix seconds; None for no absolute end."""
    look_s: float = LOOK_S

    def command(self) -> str:
        end = 0 if self.end is None else int(self.end)
        values = {"patience": max(int(self.patience_s), 1), "end": end, "look": f"{self.look_s:g}"}
        return SWITCH.format(**values, url=shlex.quote(self.url.rstrip("/")))


def onstart(public_key: str, own: str, switch: Switch | None) -> str:
    """The whole of it; `own` are the commands of the node type. Raises `ClusterSettingsError` where it is too long."""
    end = "" if switch is None else switch.command()
    text = "\n".join(part for part in (NO_TMUX, authorize_command(public_key), end, own) if part)
    if len(text) > LONGEST:
        raise ClusterSettingsError(
            f"node_config.onstart: with ours it has {len(text)} characters, and Vast.ai takes {LONGEST}; "
            "put the commands into setup_commands"
        )
    return text
