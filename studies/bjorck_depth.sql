-- Queries of studies/bjorck_depth.py. Four tables are not the store's: `plan` has one row per trial of the preset that
-- has been or will next be tried; `tried` one per trial with a result, and whether it `trains` as the first query says;
-- `bracket` one per search that has begun: the largest rate known to train, the smallest above it known not to, whether
-- the search is `settled`, and a `trial` of it; `student` the 97.5 % quantile t95 of Student's t for n readings.
-- A search in which no rate trains counts as its lowest rate, and one in which all do as its highest: the falls and
-- leads that follow are at least as large as they are said to be.

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
-- largest rate that trains; `below` where none does, and the lowest bounds it from above.
select norm, weight_init, depth, seed, log10(coalesce(bracket.trains, fails)) as rate, bracket.trains is null as below
from bracket
join trials using (trial)
where settled and network = 'resnet' and placement in ('every', 'none')

-- name: all_settled
-- The same once every search is settled, and nothing before.
select *
from settled
where (select bool_and(settled) from bracket)

-- name: largest_rate
-- One row per norm, initialisation and depth: the largest rate that trains, geometric mean and range over seeds.
select
    norm || ', ' || weight_init as network,
    depth,
    count(*) as n,
    count(*) filter (where below) as n_below,
    pow(10, avg(rate)) as rate,
    pow(10, min(rate)) as minimum,
    pow(10, max(rate)) as maximum
from settled
group by norm, weight_init, depth
order by norm desc, weight_init, depth

-- name: accuracy_at_rates_tried
-- One row per norm, initialisation and rate that was tried at the deepest network: training accuracy over seeds, and
-- the share of trials that diverged.
with
-- one row per trial that was tried at the deepest network
deepest as (
    select trial, norm || ', ' || weight_init as network, lr, outcome
    from tried
    join trials using (trial)
    where network = 'resnet' and placement in ('every', 'none')
    qualify depth = max(depth) over ()
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

-- name: fall_without_norms
-- One row: decades by which the largest rate without norms falls from the shallowest depth to the deepest, for the
-- initialisation with which it falls least; interval over seeds.
with
-- one row per initialisation and seed
falls as (
    select weight_init, seed, arg_min(rate, depth) - arg_max(rate, depth) as fall
    from all_settled
    where norm = 'none'
    group by weight_init, seed
    having min(depth) = (select min(depth) from all_settled) and max(depth) = (select max(depth) from all_settled)
        and min(depth) < max(depth)
),

-- one row per initialisation
over_seeds as (
    select avg(fall) as measured, count(*) as n, stddev_samp(fall) / sqrt(count(*)) as error
    from falls
    group by weight_init
)

select measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by measured
limit 1

-- name: lead_of_batch_norm
-- One row: decades by which the largest rate with batch normalization is above that without norms, at the depth and
-- for the initialisation where it is least; interval over seeds.
with
-- one row per initialisation, depth and seed
leads as (
    select weight_init, depth, seed, batch.rate - bare.rate as lead
    from all_settled as batch
    join all_settled as bare using (weight_init, depth, seed)
    where batch.norm = 'batch' and bare.norm = 'none'
),

-- one row per initialisation and depth
over_seeds as (
    select avg(lead) as measured, count(*) as n, stddev_samp(lead) / sqrt(count(*)) as error
    from leads
    group by weight_init, depth
)

select measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by measured
limit 1

-- name: fall_that_batch_norm_spares
-- One row: from the shallowest depth to the deepest, by how many decades more the largest rate falls without norms than
-- with batch normalization, as a mean over initialisations; interval over seeds.
with
-- one row per norm, initialisation and seed
falls as (
    select norm, weight_init, seed, arg_min(rate, depth) - arg_max(rate, depth) as fall
    from all_settled
    group by norm, weight_init, seed
    having min(depth) = (select min(depth) from all_settled) and max(depth) = (select max(depth) from all_settled)
        and min(depth) < max(depth)
),

-- one row per seed
spared as (
    select seed, avg(bare.fall - batch.fall) as spared
    from falls as bare
    join falls as batch using (weight_init, seed)
    where batch.norm = 'batch' and bare.norm = 'none'
    group by seed
),

-- one row
over_seeds as (
    select avg(spared) as measured, count(*) as n, stddev_samp(spared) / sqrt(count(*)) as error
    from spared
)

select measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)

-- name: spread_that_batch_norm_spares
-- One row: at the deepest network, by how many decades the largest rates of the initialisations lie further apart
-- without norms than with batch normalization; interval over seeds.
with
-- one row per norm and seed at the deepest network, where there are several initialisations
spreads as (
    select norm, seed, max(rate) - min(rate) as spread
    from all_settled
    where depth = (select max(depth) from all_settled)
    group by norm, seed
    having count(distinct weight_init) > 1
),

-- one row per seed
spared as (
    select seed, bare.spread - batch.spread as spared
    from spreads as bare
    join spreads as batch using (seed)
    where batch.norm = 'batch' and bare.norm = 'none'
),

-- one row
over_seeds as (
    select avg(spared) as measured, count(*) as n, stddev_samp(spared) / sqrt(count(*)) as error
    from spared
)

select measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
