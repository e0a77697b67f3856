"""Does a swapped gate help? A byte-level mixture-of-experts language model, damaged and repaired, and one trained from scratch."""
