"""Short chat templates with tools, in the words that the families' own ones use for a call."""

TEMPLATES = {
    "hermes": (
        "{% if tools %}<|system|><tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>"
        ' Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|end|>{% endif %}'
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}'
        "{% if m.role == 'tool' %}({{ m.name }}){% endif %}<|end|>{% endfor %}<|assistant|>"
    ),
    "llama": (
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.first and tools %}Respond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}. '
        "{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}<|end|>'
        "{% endfor %}<|assistant|>"
    ),
    "mistral": (
        "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
        "<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
        "{% endfor %}]{% endif %}{% if m.role == 'tool' %}<{{ m.tool_call_id }}>{% endif %}<|end|>{% endfor %}"
        "<|assistant|>"
    ),
}
