"""A plan of ``megatron_mhc.schedules`` bound to Megatron: its steps, edges and embeddings."""
