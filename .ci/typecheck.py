"""Runs ty over the packages and holds each folder to the number of diagnostics in typecheck.json; 0 means clean.

A folder that is not listed must be clean. When a folder got better, `make types` writes that down, and never a higher
number.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

PACKAGES = ("bruno_ray", "serve", "cluster")
ALLOWED = Path(__file__).with_name("typecheck.json")
DIAGNOSTIC = re.compile(r"^((?:\w+/)*)(\w+)\.py:\d+:\d+: (?:error|warning)\[")


def diagnostics() -> tuple[list[str], Counter[str]]:
    """ty's lines, and their number by folder. Ends the program if ty itself fails."""
    command = ["ty", "check", "--python", sys.prefix, "--output-format", "concise", *PACKAGES]
    done = subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if DIAGNOSTIC.match(line)]
    if done.returncode not in (0, 1) or (done.returncode == 1 and not lines):
        sys.exit(done.stdout + done.stderr)
    return lines, Counter(DIAGNOSTIC.match(line)[1].rstrip("/") for line in lines)


def main(rewrite: bool) -> int:
    lines, found = diagnostics()
    allowed = json.loads(ALLOWED.read_text()) if ALLOWED.exists() else dict(found)
    worse = {folder for folder, count in found.items() if count > allowed.get(folder, 0)}
    better = {folder for folder, count in allowed.items() if found[folder] < count}
    for line in lines:
        if DIAGNOSTIC.match(line)[1].rstrip("/") in worse:
            print(line)
    for folder in sorted(worse):
        print(f"{folder}: {found[folder]} diagnostics, {allowed.get(folder, 0)} allowed")
    if worse:
        return 1
    if rewrite or not ALLOWED.exists():
        ALLOWED.write_text(json.dumps(dict(sorted(found.items())), indent=2) + "\n")
    elif better:  # or a package is installed here whose types were not known there
        print(f"better than before: {', '.join(sorted(better))}; `make types` writes that down")
    print(f"types: {sum(found.values())} known diagnostics in {len(found)} folders, none elsewhere")
    return 0


if __name__ == "__main__":
    sys.exit(main(rewrite="--rewrite" in sys.argv))
