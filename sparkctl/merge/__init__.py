"""The trained model as a folder that vLLM and transformers load, or as an adapter that peft loads."""
