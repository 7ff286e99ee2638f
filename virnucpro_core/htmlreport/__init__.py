"""The report of a job: one HTML file for people, beside the result.

It tells what the ledger, the input and the matrix hold, and nothing of the moment it is made in: made again, it has
the same bytes. So it may be written twice, like everything else that is published.
"""
