"""What a score is: step-tokens, heads, step and trajectory scores, the loss, the state of a stream, and the ops behind them."""
