-- One run of one environment, by its id or one of its aliases.
-- $1 id  $2 organization id  $3 environment id; text
-- Returns its row, or none.
SELECT run.*
FROM mollifier.runs AS run
WHERE run.organization_id = $2 AND run.environment_id = $3 AND run.id = coalesce(
    (SELECT alias.run_id FROM mollifier.run_aliases AS alias WHERE alias.id = $1 AND alias.environment_id = $3), $1
)
