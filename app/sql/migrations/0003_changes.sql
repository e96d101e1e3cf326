-- What changes to runs have to remember, and the order in which runs are listed.

ALTER TABLE mollifier.runs
    ADD COLUMN revision integer NOT NULL DEFAULT 0,
    ADD COLUMN applied text[] NOT NULL DEFAULT '{}';

COMMENT ON COLUMN mollifier.runs.revision IS 'counts the changes that operations made';
COMMENT ON COLUMN mollifier.runs.applied IS 'the last operations that changed the run, by stream entry';

ALTER TYPE mollifier.new_run ADD ATTRIBUTE metadata_version integer;
ALTER TYPE mollifier.new_run ADD ATTRIBUTE revision integer;
ALTER TYPE mollifier.new_run ADD ATTRIBUTE applied text[];

CREATE INDEX runs_by_environment ON mollifier.runs (environment_id, created_at DESC, id DESC);
