-- The parents that runs name, each in the child's own environment only; an alias stands for its winner.
-- $1 organization ids  $2 environment ids  $3 parents' ids; text[]
-- Returns one row per child, in order; `id` is null where there is no such run.
SELECT run.id, run.depth, coalesce(run.root_run_id, run.id) AS root_run_id
FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY
    AS wanted (organization_id, environment_id, parent_run_id, position)
LEFT JOIN mollifier.run_aliases AS alias
    ON alias.id = wanted.parent_run_id AND alias.environment_id = wanted.environment_id
LEFT JOIN mollifier.runs AS run
    ON run.id = coalesce(alias.run_id, wanted.parent_run_id)
    AND run.environment_id = wanted.environment_id AND run.organization_id = wanted.organization_id
ORDER BY wanted.position
