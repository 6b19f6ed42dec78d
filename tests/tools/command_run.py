"""A run of `ressa repair` in a process of its own, without the report's drawings."""

from ressa.cli import main_job
from ressa.cli.app import parse
from ressa.cli.read_recipe import read_options
from ressa.cli.repair import KEYS


def main_job_of(line):
    "Make the run of a command line; what stands behind `ressa repair` in it."
    parsed = parse(["repair", *line])
    read = read_options(parsed, *KEYS, training=True)
    read.line = parsed.line
    main_job.html_report = lambda *what: "<html></html>"
    main_job.main_job(read)
