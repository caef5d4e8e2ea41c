"""The demo of Shoal: a tiny hub that speaks the Hugging Face protocol, and the tiny model it serves."""

from pathlib import Path

MODELS_DIR = Path(__file__).parent / "models"
"""Root of the packaged repositories, laid out as `<org>/<name>/...`; the default root of the hub."""

DEMO_MODEL = "shoal/tiny-fish"
DEMO_PROMPT = "Why do fish swim together?"
