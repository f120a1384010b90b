"""What guesses tokens: each drafter, and how their guesses are combined and judged."""
