"""The demo of Shoal: a tiny hub that speaks the Hugging Face protocol, and the tiny model it serves."""

from pathlib import Path

MODELS_DIR = Path(__file__).parent / "models"
"""Root of the packaged repositories, laid out as `<org>/<name>/...`; the hub serves it by default."""

DEMO_MODEL = "shoal/tiny-fish"
DEMO_PROMPT = "Why do fish swim together?"
