"""Mechanistic interpretability of LLaVA models: every activation named, cached, patched and explained."""
