"""Chat templates that do with tools what those of the model families do, by the same constructs,
and no more."""

from __future__ import annotations

# Qwen2.5, Hermes: a block for each call; arguments through tojson; results in a user's turn.
HERMES = """\
{%- if tools %}{{- '<|im_start|>system\\nTools:\\n' }}{%- for tool in tools %}{{- tool | tojson }}
    {%- endfor %}
{{- '\\n<tool_call>\\n{"name": <function-name>, "arguments": <args>}\\n' }}
{{- '</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'user' or message.role == 'system' or (message.role == 'assistant'
      and not message.tool_calls) %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
  {%- elif message.role == 'assistant' %}
    {{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
    {%- for tool_call in message.tool_calls %}
      {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
      {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
      {{- tool_call.arguments | tojson }}{{- '}\\n</tool_call>' }}
    {%- endfor %}{{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' }}{{- message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Qwen3: reasoning beside the content, which must be a text; arguments as a text or a mapping.
QWEN3 = """\
{%- for message in messages %}
  {%- if message.role == 'user' or message.role == 'system' %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
  {%- elif message.role == 'assistant' %}
    {%- set content = message.content %}{%- set reasoning_content = '' %}
    {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
      {%- set reasoning_content = message.reasoning_content %}
    {%- elif '</think>' in message.content %}
      {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if reasoning_content %}{{- '<think>\\n' + reasoning_content.strip('\\n')
        + '\\n</think>\\n\\n' }}{%- endif %}
    {{- content.lstrip('\\n') }}
    {%- for tool_call in message.tool_calls or [] %}
      {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
      {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
      {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
      {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
      {{- '}\\n</tool_call>' }}
    {%- endfor %}{{- '<|im_end|>\\n' }}
  {%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
      {{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# Llama 3.2: one call at a time, in JSON; a message with the entry tool_calls is a call.
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
  {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
    {{- '<|start_header_id|>' + message['role']
        + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
  {%- elif 'tool_calls' in message %}
    {%- if not message.tool_calls|length == 1 %}{{- raise_exception("One call at a time!") }}{%- endif %}
    {%- set tool_call = message.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
    {{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}
    {{- tool_call.arguments | tojson }}{{- "}" }}{{- "<|eot_id|>" }}
  {%- elif message.role == "tool" or message.role == "ipython" %}
    {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
    {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
    {%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

PYTHONIC = """\
{%- for message in messages %}
  {%- if 'tool_calls' in message %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n[' -}}
    {%- for tool_call in message.tool_calls %}
      {%- set tool_call = tool_call.function %}{{- tool_call.name + '(' -}}
      {%- for param in tool_call.arguments %}
        {{- param + '=' -}}
            {{- "%s" | format(tool_call.arguments[param]) -}}{% if not loop.last %}, {% endif %}
      {%- endfor %}{{- ')' -}}{% if not loop.last %}, {% endif %}
    {%- endfor %}{{- ']<|eot_id|>' -}}
  {%- elif message.role == 'tool' %}{{- 'ipython: ' + {"output": message.content} | tojson }}
  {%- else %}{{- message.role + ': ' + message.content | trim + '<|eot_id|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""

# Mistral Nemo: roles in turn, ids of nine letters and digits, content that is added to a text.
MISTRAL = """\
{%- for message in messages if message.role == 'user' and message.content is not string %}
  {{- raise_exception('texts!') }}{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
  {%- if message["role"] == "user" %}{{- "[INST]" + message["content"] + "[/INST]" }}
  {%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- "[TOOL_CALLS][" }}
    {%- for tool_call in message.tool_calls %}
      {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
      {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
        {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}
      {{- ', "id": "' + tool_call.id + '"}' }}{%- if not loop.last %}{{- ", " }}{%- else %}
          {{- "]" + eos_token }}{%- endif %}
    {%- endfor %}
  {%- elif message["role"] == "assistant" %}{{- message["content"] + eos_token }}
  {%- elif message["role"] == "tool" %}
    {%- if message.tool_call_id|length != 9 %}{{- raise_exception("IDs!") }}{%- endif %}
    {{- '[TOOL_RESULTS]{"content": ' + message.content|string
        + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
  {%- elif message["role"] == "system" %}{{- "[SYSTEM_PROMPT]" + message["content"] + "[/SYSTEM_PROMPT]" }}
  {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}
{%- endfor %}"""

MISTRAL_ARGS = """\
{%- for message in messages %}
  {%- if message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
  {%- elif message.role == 'assistant' %}{{- message.content or '' }}
    {%- for tool in message.tool_calls or [] %}
      {%- set arguments = tool.function.arguments %}
      {%- if arguments is not string %}{%- set arguments = arguments|tojson|safe %}{%- endif %}
      {{- '[TOOL_CALLS]' + tool.function.name + '[ARGS]' + arguments }}
    {%- endfor %}{{- eos_token }}
  {%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
      {%- endif %}
{%- endfor %}"""

# DeepSeek-R1: a call only where the content is none, arguments added to a text; the prompt opens reasoning.
DEEPSEEK = """\
{{bos_token}}{%- for message in messages %}
{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is none %}
  {%- for tool in message['tool_calls'] %}{{'<｜tool▁call▁begin｜>' + tool['type']
      + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n' + tool['function']['arguments']
      + '\\n```<｜tool▁call▁end｜>'}}{%- endfor %}
{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}
  {%- set content = message['content'] %}{%- if '</think>' in content %}
      {%- set content = content.split('</think>')[-1] %}{%- endif %}
  {{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}
{%- if message['role'] == 'tool' %}{{'<｜tool▁output▁begin｜>' + message['content']
    + '<｜tool▁output▁end｜>'}}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"""

PLAIN = """\
{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content']
    + '<|im_end|>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Qwen3-Coder: the marker of Hermes around something else.
CODER = """\
{%- for message in messages %}{{- message.role + ': ' + message.content }}
  {%- for tool_call in message.tool_calls or [] %}
      {{- '\\n<tool_call>\\n<function=' + tool_call.function.name + '>\\n' }}
    {%- for key, value in tool_call.function.arguments|items %}{{- '<parameter=' + key
        + '>\\n' + value + '\\n</parameter>\\n' }}{%- endfor %}
    {{- '</function>\\n</tool_call>' }}{%- endfor %}
{%- endfor %}"""

TEMPLATES = {  # and the format and the reasoning that it stands for
    "hermes": (HERMES, "hermes", None),
    "qwen3": (QWEN3, "hermes", "think"),
    "llama3": (LLAMA3, "llama3_json", None),
    "pythonic": (PYTHONIC, "llama_pythonic", None),
    "mistral": (MISTRAL, "mistral", None),
    "mistral_args": (MISTRAL_ARGS, "mistral_args", None),
    "deepseek": (DEEPSEEK, None, "think"),
    "plain": (PLAIN, None, None),
    "coder": (CODER, None, None),
}
