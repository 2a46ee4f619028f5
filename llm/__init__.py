"""The agents' language model: policy, decoding, packing, loading, adapters."""
