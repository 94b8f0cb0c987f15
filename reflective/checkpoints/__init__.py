"""Where models and heads come from and go to: directories, the Hugging Face Hub, the embedded default."""
