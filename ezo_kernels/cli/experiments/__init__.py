"""``ezo experiment``: what the ElasticZO paper evaluates, run from one command, resumable."""
