"""A small team of agents, each of them its own served model.

    python team.py "Why is the sky blue?" [--config team.toml] [--only critic] [--output answer.md]

The orchestrator plans, every specialist works on the plan, and the orchestrator puts their answers together. CrewAI's
hierarchical process is not used: it delegates by tool calls, which small or edited models do badly.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before crewai is imported, which reads them then: nothing is reported to anyone.
os.environ.setdefault("CREWAI_DISABLE_TELEMETRY", "true")
os.environ.setdefault("CREWAI_TRACING_ENABLED", "false")
os.environ.setdefault("CREWAI_DISABLE_VERSION_CHECK", "true")
os.environ.setdefault("OTEL_SDK_DISABLED", "true")

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:  # it takes seconds: a mistake in the team's file is said before
    from crewai import Agent, Crew

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Member:
    """One role of the team; `model` is an id that the server lists."""

    name: str
    model: str
    role: str
    goal: str
    backstory: str

    @classmethod
    def read(cls, name: str, section: dict[str, Any]) -> "Member":
        try:
            return cls(name, **{key: section[key] for key in ("model", "role", "goal", "backstory")})
        except KeyError as error:
            raise SystemExit(f"{name} has no {error.args[0]}: add it to the team's file") from error


@dataclass(frozen=True)
class Team:
    base_url: str
    temperature: float
    max_tokens: int
    orchestrator: Member
    specialists: tuple[Member, ...]

    @classmethod
    def read(cls, path: Path, only: Sequence[str] = ()) -> "Team":
        """The team in a TOML file; ``only`` names the specialists to use. Exits with a message on a mistake."""
        content = tomllib.loads(path.read_text())
        for name in ("base_url", "orchestrator", "specialist"):
            if name not in content:
                raise SystemExit(f"{path} has no {name}: see team.toml beside team.py")
        specialists = [Member.read(part.get("name", "a specialist"), part) for part in content["specialist"]]
        known = {member.name for member in specialists}
        if unknown := set(only) - known:
            raise SystemExit(
                f"there is no specialist {', '.join(sorted(unknown))}: there are {', '.join(sorted(known))}"
            )
        return cls(
            base_url=content["base_url"],
            temperature=float(content.get("temperature", 0.7)),
            max_tokens=int(content.get("max_tokens", 1024)),
            orchestrator=Member.read("orchestrator", content["orchestrator"]),
            specialists=tuple(member for member in specialists if not only or member.name in only),
        )

    def crew(self, key: str) -> "Crew":
        """The tasks in the order they are done: plan, one per specialist, the whole."""
        from crewai import Crew, Process, Task

        lead = self._agent(self.orchestrator, key)
        plan = Task(
            description="Plan how to do this: {task}",
            expected_output="a short list of steps",
            agent=lead,
        )
        parts = [
            Task(
                description="Do your part of this: {task}",
                expected_output="your contribution",
                agent=self._agent(member, key),
                context=[plan],
            )
            for member in self.specialists
        ]
        whole = Task(
            description="Answer with what the team found: {task}",
            expected_output="the answer",
            agent=lead,
            context=parts,
        )
        agents = [lead, *(part.agent for part in parts)]
        return Crew(agents=agents, tasks=[plan, *parts, whole], process=Process.sequential, tracing=False)

    def _agent(self, member: Member, key: str) -> "Agent":
        from crewai import LLM, Agent

        llm = LLM(
            model=member.model,
            custom_openai=True,  # any id of ours, whatever it looks like
            base_url=self.base_url,
            api_key=key,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
        )
        return Agent(role=member.role, goal=member.goal, backstory=member.backstory, llm=llm, max_retry_limit=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", help="what the team is to do")
    parser.add_argument("--config", type=Path, default=HERE / "team.toml", help="the team (default: %(default)s)")
    parser.add_argument("--only", type=lambda names: names.split(","), default=[], help="specialists, with commas")
    parser.add_argument("--output", type=Path, help="write the answer to this file as well")
    arguments = parser.parse_args()

    team = Team.read(arguments.config, arguments.only)
    key = os.environ.get("BRUNO_API_KEY", "none")  # the client insists on one, also where the server asks for none
    result = team.crew(key).kickoff(inputs={"task": arguments.task})
    members = [team.orchestrator, *team.specialists, team.orchestrator]
    for member, output in zip(members, result.tasks_output):
        print(f"--- {member.role} ({member.model})\n{output.raw.strip()}\n")
    if arguments.output:
        arguments.output.write_text(result.raw.strip() + "\n")


if __name__ == "__main__":
    main()
