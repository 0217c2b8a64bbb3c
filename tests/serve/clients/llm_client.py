"""Simon Willison's llm, as a program with its own configuration file."""

import os
import subprocess
import sys
from pathlib import Path

home = Path(os.environ["LLM_USER_PATH"])
home.mkdir(parents=True, exist_ok=True)
entries = [
    f"- model_id: {name}\n  model_name: {os.environ[variable]}\n  api_base: {os.environ['OPENAI_BASE_URL']}\n"
    "  api_key_name: bruno\n"
    for name, variable in (("base", "MODEL"), ("edited", "EDITED"))
]
(home / "extra-openai-models.yaml").write_text("".join(entries))


def llm(*arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "llm"), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


llm("keys", "set", "bruno", "--value", os.environ["OPENAI_API_KEY"])
question = "what colour has lubesi ?"
for model in ("base", "edited"):
    streamed = llm("-m", model, "-o", "temperature", "0", question)
    whole = llm("-m", model, "-o", "temperature", "0", "--no-stream", question)
    assert streamed.strip() and streamed == whole
assert llm("-c", "-m", "base", "and its size ?").strip()  # goes on with the conversation
