"""Ask a model that Shoal runs, with OpenAI's client (`pip install openai`)."""

import os

from openai import OpenAI

GATEWAY = os.environ.get("SHOAL_GATEWAY", "http://127.0.0.1:8080")
KEY = os.environ.get("SHOAL_API_KEY", "your own node on this machine needs none")
MODEL = "shoal/tiny-fish"  # one that `shoal ps` lists; this is the demo's

client = OpenAI(base_url=f"{GATEWAY}/v1", api_key=KEY)
answer = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "Why do fish swim together?"}],
    temperature=0,
    max_tokens=100,
)
print(answer.choices[0].message.content)
if answer.usage is not None:
    print(f"{answer.usage.prompt_tokens} tokens in, {answer.usage.completion_tokens} out")
