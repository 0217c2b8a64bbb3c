"""Chat templates that print the date, as they are on the hub, without their tools."""

LLAMA_32 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{#- System message #}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
"""Llama 3.2 and 3.3: reads `date_string`, which nobody gives it, and asks the clock otherwise."""

LLAMA_31 = LLAMA_32.replace(
    """\
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
""",
    """\
    {%- set date_string = "26 Jul 2024" %}
""",
)
"""Prints the same day for ever."""

MISTRAL = """\
{%- set today = strftime_now("%Y-%m-%d") %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {{- '[SYSTEM_PROMPT]' + messages[0]['content'] + '[/SYSTEM_PROMPT]' }}
    {%- set messages = messages[1:] %}
{%- else %}
    {{- '[SYSTEM_PROMPT]The current date is ' + today + '.[/SYSTEM_PROMPT]' }}
{%- endif %}
{%- for message in messages %}
    {{- ('[INST]' + message['content'] + '[/INST]') if message['role'] == 'user' else message['content'] + eos_token }}
{%- endfor %}
"""
"""Mistral Small: asks the clock without a condition, in another format."""
