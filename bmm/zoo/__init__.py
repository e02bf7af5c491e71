"""The demo zoo: base model and text sets from registry packages, experts fine-tuned from them, a recipe."""
