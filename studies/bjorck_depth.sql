-- Queries of studies/bjorck_depth.py. Four tables are not the store's: `plan` has one row per trial of the preset that
-- has been or will next be tried; `tried` one per trial with a result, and whether it `trains` as the first query says;
-- `bracket` one per search: the largest rate known to train, the smallest above it known not to, whether the search is
-- `settled`, and a `trial` of it; `student` the 97.5 % quantile t95 of Student's t for n readings.
-- A search in which no rate trains has found none, and nor has one in which no rate fails: the first may have stepped
-- over rates that train, for it takes every rate that fails for too large. Such a search is counted and stands for no
-- rate, here as in studies/bjorck_learning_rate.sql.

-- name: trains
-- One row per trial with a result: whether it ends with at least twice as many training images right as chance has.
-- NULL where a finished trial has not been read.
with
-- one row per trial that was read: training accuracy at its last step
final as (
    select trial, arg_max_null(accuracy, step) as accuracy
    from curve
    where split = 'train'
    group by trial
)

select
    trial,
    case
        when outcome = 'diverged' then false
        when final.trial is not null then coalesce(accuracy >= if(data = 'cifar100', 0.02, 0.2), false)
    end as trains
from trials
left join final using (trial)
where outcome in ('finished', 'diverged')

-- name: settled
-- One row per search that is settled, of ResNets with norms after every layer or nowhere: decimal logarithm of the
-- largest rate that trains, NULL where none was found. A seed with several searches in one setting, as of two batch
-- sizes, is left out: they are no repeats.
select norm, weight_init, depth, seed, case when fails is not null then log10(bracket.trains) end as rate
from bracket
join trials using (trial)
where network = 'resnet' and placement in ('every', 'none')
qualify settled and count(*) over (partition by norm, weight_init, depth, seed) = 1

-- name: all_settled
-- The same once every search is settled, those that have not begun among them, and nothing before.
select *
from settled
where (select bool_and(settled) from bracket)

-- name: largest_rate
-- One row per norm, initialisation and depth: the largest rate that trains, geometric mean and range over the n seeds
-- for which one was found; for n_not_found seeds none was.
select
    norm || ', ' || weight_init as network,
    depth,
    count(rate) as n,
    count(*) - count(rate) as n_not_found,
    pow(10, avg(rate)) as rate,
    pow(10, min(rate)) as minimum,
    pow(10, max(rate)) as maximum
from settled
group by norm, weight_init, depth
order by norm desc, weight_init, depth

-- name: accuracy_at_rates_tried
-- One row per norm, initialisation and rate that was tried at the deepest network: training accuracy over seeds, and
-- the share of trials that diverged. A seed with several trials at a rate is left out.
with
-- one row per trial that was tried at the deepest network
deepest as (
    select trial, norm || ', ' || weight_init as network, lr, outcome
    from tried
    join trials using (trial)
    where network = 'resnet' and placement in ('every', 'none')
    qualify depth = max(depth) over () and count(*) over (partition by norm, weight_init, depth, lr, seed) = 1
),

-- one row per trial that was read: training accuracy at its last step
final as (
    select trial, arg_max_null(accuracy, step) as accuracy
    from curve
    where split = 'train'
    group by trial
)

select
    network,
    lr as rate,
    count(*) as n,
    avg(accuracy) as accuracy,
    count(*) filter (where outcome = 'diverged') / count(*) as diverged
from deepest
left join final using (trial)
group by network, lr
order by network, lr

-- name: falls
-- One row per norm, initialisation and seed: decades by which the largest rate falls from the shallowest depth to the
-- deepest; NULL where it was not found at one of them.
with
-- one row
ends as (
    select min(depth) as shallowest, max(depth) as deepest
    from all_settled
)

select
    norm,
    weight_init,
    seed,
    max(rate) filter (where depth = shallowest) - max(rate) filter (where depth = deepest) as fall
from all_settled
cross join ends
where shallowest < deepest
group by norm, weight_init, seed

-- name: spreads
-- One row per norm and seed at the deepest network: decades between the largest rates of its initialisations; NULL
-- where there is one initialisation or a rate was not found.
select
    norm,
    seed,
    case when count(*) > 1 and count(rate) = count(*) then max(rate) - min(rate) end as spread
from all_settled
where depth = (select max(depth) from all_settled)
group by norm, seed

-- name: effects
-- One row per effect, setting and seed: decades, NULL where one of the rates was not found. `fall`: by which the rate
-- falls with depth without norms. `lead`: by which it is larger with batch normalization. `spared fall`, `spared
-- spread`: by which it falls further, and its initialisations lie further apart, without norms than with them.
select 'fall' as effect, weight_init as setting, seed, fall as decades
from falls
where norm = 'none'

union all

select 'lead', weight_init || ', ' || depth, seed, batch.rate - bare.rate
from all_settled as batch
join all_settled as bare using (weight_init, depth, seed)
where batch.norm = 'batch' and bare.norm = 'none'

union all

select 'spared fall', weight_init, seed, bare.fall - batch.fall
from falls as batch
join falls as bare using (weight_init, seed)
where batch.norm = 'batch' and bare.norm = 'none'

union all

select 'spared spread', 'deepest', seed, bare.spread - batch.spread
from spreads as batch
join spreads as bare using (seed)
where batch.norm = 'batch' and bare.norm = 'none'

-- name: least_effect
-- One row per effect: its decades in the setting where they are least, interval over seeds. One setting of less than
-- 0.3, a step of the lattice, is enough to refute a claim, and n are its seeds; to bear it out takes all, and then n
-- are the seeds of the setting that has fewest.
with
-- one row per effect and setting
over_seeds as (
    select
        effect,
        setting,
        avg(decades) as measured,
        count(decades) as readings,
        stddev_samp(decades) / sqrt(count(decades)) as error
    from effects
    group by effect, setting
),

-- one row per effect
least as (
    select *, min(readings) over (partition by effect) as fewest
    from over_seeds
    qualify row_number() over (partition by effect order by measured nulls last, setting) = 1
)

select
    effect,
    setting,
    measured,
    if(measured < 0.3, readings, fewest) as n,
    measured - t95 * error as low,
    measured + t95 * error as high
from least
left join student on student.n = readings
order by effect
