"""Does a swapped gate pay? A small byte-level mixture-of-experts language model, damaged and mended, and one trained from scratch."""
