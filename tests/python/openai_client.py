"""Talks to a router as any user would, with the official `openai` package. Prints one JSON document."""

import json
import sys

import openai

base_url = sys.argv[1]
client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=120)

model = client.models.list().data[0].id
messages = [{"role": "user", "content": "What is the boiling point of water in Celsius?"}]

stream = client.chat.completions.create(
    model=model,
    messages=messages,
    temperature=0,
    max_tokens=24,
    stream=True,
    stream_options={"include_usage": True},
)
text, usage, finish = "", None, None
for chunk in stream:
    if chunk.usage:
        usage = chunk.usage
    for choice in chunk.choices:
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish

whole = client.chat.completions.create(
    model=model, messages=messages, temperature=0, max_tokens=24, logprobs=True, top_logprobs=3
)
completion = client.completions.create(model=model, prompt="The capital of France is", temperature=0, max_tokens=4)

errors = {}
for name, call in {
    "unknown_model": lambda: client.chat.completions.create(model="nonsense", messages=messages),
    "empty_messages": lambda: client.chat.completions.create(model=model, messages=[]),
    "n_2": lambda: client.chat.completions.create(model=model, messages=messages, n=2),
    "tools": lambda: client.chat.completions.create(
        model=model,
        messages=messages,
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
    ),
    "max_tokens_0": lambda: client.chat.completions.create(model=model, messages=messages, max_tokens=0),
    "max_tokens_2_63": lambda: client.chat.completions.create(model=model, messages=messages, max_tokens=2**63),
    "long_prompt": lambda: client.completions.create(model=model, prompt="word " * 20_000),
    "empty_prompt": lambda: client.completions.create(model=model, prompt=""),
}.items():
    try:
        call()
        errors[name] = None
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        errors[name] = {"status": error.status_code, "param": body.get("param"), "message": body.get("message")}

print(
    json.dumps(
        {
            "model": model,
            "streamed": text,
            "finish_reason": finish,
            "usage": usage.model_dump() if usage else None,
            "whole": whole.choices[0].message.content,
            "logprobs": [token.top_logprobs[0].logprob for token in whole.choices[0].logprobs.content],
            "logprob_tokens": "".join(token.token for token in whole.choices[0].logprobs.content),
            "completion": completion.choices[0].text,
            "errors": errors,
        }
    )
)
