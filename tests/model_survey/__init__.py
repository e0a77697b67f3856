"""Build every mixture-of-experts model type of transformers tiny, swap it, and examine what the swap promises."""
