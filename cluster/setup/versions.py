"""A set-up command: `python -m cluster.setup.versions` fails when Python or Ray here and on the laptop differ."""

import json
import sys
from pathlib import Path

from cluster.setup.mounts import VERSIONS_MOUNT, installed_versions


def differences(here: dict[str, str], laptop: dict[str, str]) -> list[str]:
    """One sentence for each difference."""
    return [
        f"{name} is {here.get(name, 'missing')} here and {wanted} on the laptop"
        for name, wanted in laptop.items()
        if here.get(name) != wanted
    ]


def main() -> int:
    here = installed_versions()
    found = differences(here, json.loads(Path(VERSIONS_MOUNT).expanduser().read_text()))
    if found:
        sys.stderr.write(f"{'; '.join(found)}: install the same version here (setup_commands) or there\n")
        return 2
    sys.stdout.write(f"versions agree with the laptop's: {here}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
