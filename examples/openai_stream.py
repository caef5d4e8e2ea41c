"""Print an answer as it arrives, with OpenAI's client (`pip install openai`)."""

import os

from openai import OpenAI

GATEWAY = os.environ.get("SHOAL_GATEWAY", "http://127.0.0.1:8080")
KEY = os.environ.get("SHOAL_API_KEY", "your own node on this machine needs none")
MODEL = "shoal/tiny-fish"  # one that `shoal ps` lists; this is the demo's

client = OpenAI(base_url=f"{GATEWAY}/v1", api_key=KEY)
chunks = client.chat.completions.create(
    model=MODEL,
    messages=[{"role": "user", "content": "Why do fish swim together?"}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in chunks:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage is not None:
        print(f"\n{chunk.usage.completion_tokens} tokens")
