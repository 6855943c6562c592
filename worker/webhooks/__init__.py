"""Who is told that a job has ended, and what if nobody listens?"""
