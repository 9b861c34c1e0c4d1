"""The page to try prompts on, and where pages are found."""
