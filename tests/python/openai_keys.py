"""Talks to a router that asks for keys with the official `openai` package. Prints what came of it as one JSON document.

    openai_keys.py BASE_URL KEY
"""

import json
import sys

import openai

base_url, key = sys.argv[1:]


def ask(api_key, tenant=None):
    headers = {} if tenant is None else {"x-perigee-tenant": tenant}
    client = openai.OpenAI(
        base_url=f"{base_url}/v1", api_key=api_key, default_headers=headers, max_retries=0, timeout=120
    )
    try:
        model = client.models.list().data[0].id
        answer = client.completions.create(model=model, prompt="hello", max_tokens=4, temperature=0)
    except openai.APIStatusError as error:
        return {"error": type(error).__name__, "status": error.status_code, "code": error.code, "type": error.type}
    return {"tokens": answer.usage.completion_tokens}


print(
    json.dumps(
        {
            "own": ask(key),
            "own_tenant": ask(key, "a"),
            "other_tenant": ask(key, "b"),
            "wrong": ask("perigee-wrong"),
        }
    )
)
