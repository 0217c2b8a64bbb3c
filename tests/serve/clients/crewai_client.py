"""crewai: one call and a crew of two agents, each with a model id of its own."""

import os

os.environ |= {"CREWAI_DISABLE_TELEMETRY": "true", "OTEL_SDK_DISABLED": "true", "CREWAI_TRACING_ENABLED": "false"}
os.environ["CREWAI_DISABLE_VERSION_CHECK"] = "true"

from crewai import LLM, Agent, Crew, Task


def model(variable: str) -> LLM:
    return LLM(
        model=f"openai/{os.environ[variable]}", base_url=os.environ["OPENAI_BASE_URL"],
        api_key=os.environ["OPENAI_API_KEY"], temperature=0, max_tokens=12,
    )  # fmt: skip


assert model("MODEL").call("what colour has lubesi ?")
agents = [
    Agent(role=role, goal="say", backstory="short", llm=model(variable), max_iter=1, allow_delegation=False)
    for role, variable in (("first", "MODEL"), ("second", "EDITED"))
]
tasks = [Task(description="say it", expected_output="words", agent=agent) for agent in agents]
result = Crew(agents=agents, tasks=tasks, verbose=False).kickoff()
assert len(result.tasks_output) == 2
