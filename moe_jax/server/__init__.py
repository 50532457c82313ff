"""A server for programs that speak OpenAI's completions API: requests in, a continuous batch, text out."""
