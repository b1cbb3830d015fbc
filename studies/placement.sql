-- Queries of studies/placement.py. Three tables are not the store's: `plan` has one row per trial of the preset;
-- `chosen` one row per trial with a result, with its test accuracy at the end (null where it diverged); `student` the
-- 97.5 % quantile t95 of Student's t for n readings. The learning rate is an axis here, for what has few norms needs
-- others than what has many: `best` chooses one for each network, on held-out training images, and what builds on it
-- speaks of that rate. A difference is between networks of one seed, which have the same first weights and batches.

-- name: planned
-- One row per trial of the preset, run or not: its rate, and as `design` its other axes. No row where an axis beside
-- depth, placement, rate and what trains has several values: settings are never taken for seeds.
with
-- one row per trial
axes as (
    select
        trial,
        try_cast(regexp_extract(cell, '(^| )lr=(\S+)', 2) as double) as lr,
        trim(regexp_replace(cell, '(^| )lr=\S+', '')) as design,
        trim(regexp_replace(cell, '(^| )(lr|depth|placement|trainable)=\S+', '', 'g')) as others
    from plan
)

select trial, lr, design
from axes
qualify min(others) over () = max(others) over ()

-- name: results
-- One row per trial with a result: what it reached at its last step, in evaluation mode, null where it diverged. The
-- gap is training less test accuracy of the same weights, on as many images of each. The variances are what so few
-- images leave uncertain of one network's accuracies: all seeds share the images, and more seeds do not make it less.
with
-- one row per trial and step that was read
readings as (
    select
        trial,
        step,
        max(accuracy) filter (where split = 'train') as train,
        max(accuracy) filter (where split = 'test') as test,
        max(accuracy) filter (where split = 'validation') as held_out,
        max(loss) filter (where split = 'train') as train_loss,
        max(images) filter (where split = 'train') as train_images,
        max(images) filter (where split = 'test') as test_images
    from curve
    group by trial, step
),

-- one row per trial that finished
ends as (
    select readings.*
    from readings
    join trials using (trial, step)
    where outcome = 'finished'
)

select
    trial,
    design,
    depth,
    placement,
    trainable,
    planned.lr,
    seed,
    outcome,
    train,
    test,
    train - test as gap,
    held_out,
    train_loss,
    train * (1 - train) / train_images as train_variance,
    test * (1 - test) / test_images as test_variance,
    1 / case data when 'cifar100' then 100 else 10 end as chance
from chosen
join planned using (trial)
join trials using (trial)
left join ends using (trial)

-- name: complete
-- One row per trial of the seeds that have a result at every rate planned for their network: of another, the best rate
-- may be the one that is missing.
with
-- one row per network
ladders as (
    select design, count(distinct lr) as rates
    from planned
    group by design
)

select results.*, rates
from results
join ladders using (design)
qualify count(*) over (partition by design, seed) = rates

-- name: best
-- One row per network: the rate that is best on held-out training images; one at which no seed diverged comes first.
-- Without held-out images there is a row only where there is nothing to choose: test images choose nothing.
with
-- one row per network and rate
by_rate as (
    select
        design,
        lr,
        any_value(rates) as rates,
        count(*) as results,
        count(*) filter (where outcome = 'diverged') as diverged,
        avg(held_out) as held_out
    from complete
    group by design, lr
)

select
    design,
    lr,
    case
        when rates > 1 and lr = (select min(lr) from planned where planned.design = by_rate.design) then 'least'
        when rates > 1 and lr = (select max(lr) from planned where planned.design = by_rate.design) then 'greatest'
    end as at_end
from by_rate
where held_out is not null or diverged = results or rates = 1
qualify row_number() over (partition by design order by diverged = 0 desc, held_out desc nulls last, lr) = 1

-- name: reached
-- One row per network and seed, at the rate that was chosen. `kind`: where norms stand, or that nothing else trains.
-- `accuracy` is on test images, null where the network diverged; `at_least` counts that as chance: at every rate, or no
-- other would have been chosen, some seed diverged.
select
    depth,
    placement,
    trainable,
    case trainable when 'all' then placement else trainable || ', ' || placement end as kind,
    complete.lr,
    at_end,
    seed,
    outcome,
    train,
    train_loss,
    gap,
    test as accuracy,
    train_variance,
    coalesce(test_variance, 0) as test_variance,
    coalesce(test, case when outcome = 'diverged' then chance end) as at_least
from complete
join best using (design)
where complete.lr = best.lr

-- name: counted
-- One row per depth and place: norm layers of the network, as the probe of times counts them.
select depth, timing.placement, max(norms) as norms
from timing
join trials using (trial)
where mode = 'train' and trial in (select trial from planned)
group by depth, timing.placement

-- name: accuracy_over_depth
-- One row per kind and depth: test accuracy over seeds with its 95 % interval, at the chosen rate. `at_end`: where that is
-- the least or the greatest of several; beyond it may be a better one.
with
-- one row per kind and depth
over_seeds as (
    select
        kind,
        depth,
        any_value(lr) as lr,
        any_value(at_end) as at_end,
        count(accuracy) as n,
        avg(accuracy) as accuracy,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error,
        count(*) filter (where outcome = 'diverged') / count(*) as diverged
    from reached
    group by kind, depth
)

select kind, depth, lr, at_end, n, accuracy, accuracy - t95 * error as low, accuracy + t95 * error as high, diverged
from over_seeds
left join student using (n)
order by kind, depth

-- name: gap_over_depth
-- One row per kind and depth: training less test accuracy over seeds with its 95 % interval, at the chosen rate.
with
-- one row per kind and depth
over_seeds as (
    select
        kind,
        depth,
        any_value(lr) as lr,
        count(gap) as n,
        avg(gap) as gap,
        avg(train) as train,
        stddev_samp(gap) / sqrt(count(gap)) as error
    from reached
    group by kind, depth
)

select kind, depth, lr, n, gap, gap - t95 * error as low, gap + t95 * error as high, train
from over_seeds
left join student using (n)
order by kind, depth

-- name: accuracy_over_norms
-- One row per family and number of norms, everything trained: test accuracy over seeds with its 95 % interval. One
-- family has a norm everywhere, and its depth changes; in the others the depth stays and norms are left out. Of two
-- places with as many norms the first by name stands here.
with
-- one row per depth and place
over_seeds as (
    select
        depth,
        placement,
        any_value(norms) as norms,
        count(accuracy) as n,
        avg(accuracy) as accuracy,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error
    from reached
    join counted using (depth, placement)
    where trainable = 'all' and norms > 0
    group by depth, placement
),

-- one row per family, depth and place; a network with every norm begins the family of its depth, too
families as (
    select 'every' as family, *
    from over_seeds
    where placement = 'every'
    union all
    select depth || ' layers', *
    from over_seeds
    qualify count(*) over (partition by depth) > 1
)

select
    family,
    depth,
    placement,
    norms,
    n,
    accuracy,
    accuracy - t95 * error as low,
    accuracy + t95 * error as high
from families
left join student using (n)
qualify row_number() over (partition by family, norms order by placement) = 1
order by family, norms

-- name: told_apart
-- One row per depth and network: a norm everywhere, half the norms at the same depth, and the network of half the depth
-- with a norm everywhere, which has as many norms as the second: test accuracy over seeds with its 95 % interval.
with
-- one row per depth and network, of the depths that have half the norms
networks as (
    select distinct depth as whole, depth, 'every' as placement, 'every' as network
    from reached
    where placement = 'every_2' and trainable = 'all'
    union all
    select distinct depth, depth, 'every_2', 'every_2'
    from reached
    where placement = 'every_2' and trainable = 'all'
    union all
    select distinct depth, 6 * round((depth / 2 - 2) / 6)::bigint + 2, 'every', 'half the depth'
    from reached
    where placement = 'every_2' and trainable = 'all'
),

-- one row per depth and network
over_seeds as (
    select
        whole,
        network,
        depth,
        placement,
        any_value(norms) as norms,
        count(accuracy) as n,
        avg(accuracy) as accuracy,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error
    from networks
    join reached using (depth, placement)
    left join counted using (depth, placement)
    where trainable = 'all'
    group by whole, network, depth, placement
)

select
    whole as depth,
    network,
    depth as layers,
    norms,
    n,
    accuracy,
    accuracy - t95 * error as low,
    accuracy + t95 * error as high
from over_seeds
left join student using (n)
order by whole, network

-- name: beside_every
-- One row per place, depth and seed: a network with fewer norms or none, less that with a norm everywhere, of the same
-- depth and seed, everything trained. The variances are what so few images leave uncertain of a difference, as if the
-- two erred on images that have nothing to do with each other: the most it can be while they err on like images.
select
    fewer.placement,
    fewer.trainable,
    depth,
    seed,
    fewer.at_least - every.at_least as accuracy,
    fewer.test_variance + every.test_variance as accuracy_variance,
    fewer.gap - every.gap as gap,
    fewer.test_variance + every.test_variance + fewer.train_variance + every.train_variance as gap_variance,
    fewer.train >= 0.9 and every.train >= 0.9 as fit,
    ln(nullif(fewer.train_loss, 0) / nullif(every.train_loss, 0)) as log_loss
from reached as fewer
join reached as every using (depth, seed)
where (every.placement, every.trainable) = ('every', 'all') and fewer.trainable = 'all' and fewer.placement != 'every'

-- name: depths_of
-- One row per place and what trains: at how many depths the preset has it, run or not, and the least and the greatest.
with
-- one row per trial of the preset
networks as (
    select
        coalesce(nullif(regexp_extract(design, '(^| )placement=(\S+)', 2), ''), 'every') as placement,
        coalesce(nullif(regexp_extract(design, '(^| )trainable=(\S+)', 2), ''), 'all') as trainable,
        regexp_extract(design, '(^| )depth=(\S+)', 2)::bigint as depth
    from planned
)

select placement, trainable, count(distinct depth) as depths, min(depth) as shallowest, max(depth) as deepest
from networks
group by placement, trainable

-- name: kept_accuracy
-- One row per place: test accuracy less that of a norm everywhere at the same depth, mean over the depths that the
-- preset has, with a 95 % interval over the seeds that have them all. A seed that diverged counts as chance.
with
-- one row per place and seed
by_seed as (
    select placement, seed, avg(accuracy) as difference
    from beside_every
    join depths_of using (placement, trainable)
    where accuracy is not null
    group by placement, seed
    having count(*) = any_value(depths)
),

-- one row per place
over_seeds as (
    select
        placement,
        avg(difference) as measured,
        count(*) as n,
        stddev_samp(difference) / sqrt(count(*)) as error
    from by_seed
    group by placement
)

select placement, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by placement

-- name: gain_of_norms
-- One row: test accuracy with a norm everywhere less that without any, over the depths that the preset has.
select -measured as measured, n, -high as low, -low as high
from kept_accuracy
where placement = 'none'

-- name: blocks_and_norms
-- One row per network that a norm after every second layer is held against, `other`: one with every norm and the same
-- layers, from which it differs in norms alone, and one with every norm and half the layers, which has as many norms.
-- Test accuracy of the first less that of the other, mean over all depths at which the preset has the first, over the
-- seeds that have both at each of them, with a 95 % interval over seeds; `errors`: by its standard error, of seeds and of
-- images. `norms` and `other_norms`: of the two, added up over the depths.
with
-- one row per other network, depth and seed
pairs as (
    select
        if(other.depth = fewer.depth, 'every norm', 'half the layers') as other,
        fewer.depth,
        fewer.seed,
        fewer.at_least - other.at_least as difference,
        fewer.test_variance + other.test_variance as variance,
        own.norms,
        others.norms as other_norms
    from reached as fewer
    join reached as other
        on
            other.depth in (fewer.depth, 6 * round((fewer.depth / 2 - 2) / 6) + 2)
            and other.seed = fewer.seed
    left join counted as own on (own.depth, own.placement) = (fewer.depth, 'every_2')
    left join counted as others on (others.depth, others.placement) = (other.depth, 'every')
    where
        (fewer.placement, fewer.trainable) = ('every_2', 'all')
        and (other.placement, other.trainable) = ('every', 'all')
),

-- one row per other network and seed
by_seed as (
    select
        other,
        seed,
        avg(difference) as difference,
        avg(variance) as variance,
        sum(norms) as norms,
        sum(other_norms) as other_norms
    from pairs
    where difference is not null
    group by other, seed
    having count(*) = (select depths from depths_of where (placement, trainable) = ('every_2', 'all'))
),

-- one row per other network
over_seeds as (
    select
        other,
        avg(difference) as measured,
        count(*) as n,
        stddev_samp(difference) / sqrt(count(*)) as error,
        avg(variance) as variance,
        any_value(norms) as norms,
        any_value(other_norms) as other_norms
    from by_seed
    group by other
)

select
    other,
    measured,
    n,
    measured - t95 * error as low,
    measured + t95 * error as high,
    measured / sqrt(variance + pow(coalesce(error, 0), 2)) as errors,
    norms,
    other_norms
from over_seeds
left join student using (n)
order by other

-- name: larger_blocks
-- One row: of the two differences the smaller by its standard error. Where depth alone matters a norm after every second
-- layer beats half the layers; where fewer norms alone do, it beats every norm; only both say that larger blocks help.
select min(errors) as measured, min(n) as n, arg_min(other, errors) as other, arg_min(measured, errors) as difference
from blocks_and_norms
having count(*) = 2

-- name: expressive_power
-- One row per place: the loss on training images over that of a norm everywhere at the same depth, geometric mean over
-- depths and seeds, with a 95 % interval. No number where a seed diverged.
with
-- one row per place and seed
by_seed as (
    select placement, seed, avg(log_loss) as log_loss
    from beside_every
    join depths_of using (placement, trainable)
    group by placement, seed
    having count(*) = any_value(depths) and count(log_loss) = count(*)
),

-- one row per place
over_seeds as (
    select placement, avg(log_loss) as mean, count(*) as n, stddev_samp(log_loss) / sqrt(count(*)) as error
    from by_seed
    group by placement
    having count(*) = (select count(distinct seed) from beside_every as all_seeds where placement = by_seed.placement)
)

select placement, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by placement

-- name: wider_gap
-- One row per place: training less test accuracy, less the same of a norm everywhere at the same depth, over the depths
-- that the preset has and the seeds of which at every depth both networks have 90 % of the training images right: what
-- does not fit has no gap to speak of. By its standard error, of seeds and of images.
with
-- one row per place and seed
by_seed as (
    select placement, seed, avg(gap) as difference, avg(gap_variance) as variance
    from beside_every
    join depths_of using (placement, trainable)
    where fit
    group by placement, seed
    having count(*) = any_value(depths)
),

-- one row per place
over_seeds as (
    select
        placement,
        avg(difference) as difference,
        count(*) as n,
        sqrt(avg(variance) + coalesce(var_samp(difference) / count(*), 0)) as uncertain
    from by_seed
    group by placement
)

select placement, if(uncertain > 0, difference / uncertain, 0) as measured, n, difference, uncertain
from over_seeds
order by placement

-- name: bn_only_gain
-- One row: test accuracy of gamma and beta trained alone in the deepest network of the preset less the shallowest by its
-- standard error, of seeds and of images, over the seeds that have both. None where the preset has one depth.
with
-- one row per seed that has both depths
by_seed as (
    select deep.accuracy - shallow.accuracy as gain, deep.test_variance + shallow.test_variance as variance
    from depths_of as planned_depths
    join reached as deep
        on (deep.depth, deep.trainable, deep.placement) = (deepest, planned_depths.trainable, planned_depths.placement)
    join reached as shallow
        on
            (shallow.depth, shallow.trainable, shallow.placement, shallow.seed)
            = (shallowest, deep.trainable, deep.placement, deep.seed)
    where (planned_depths.trainable, planned_depths.placement) = ('bn', 'every') and deepest > shallowest
),

-- one row
over_seeds as (
    select
        avg(gain) as gain,
        count(gain) as n,
        sqrt(avg(variance) + coalesce(var_samp(gain) / count(gain), 0)) as uncertain
    from by_seed
    having count(gain) > 0
)

select if(uncertain > 0, gain / uncertain, 0) as measured, n, gain, uncertain
from over_seeds

-- name: paces
-- One row per depth, place, seed, kind of pass and that which it is held against, `other` and `other_mode`, of the
-- network timed in turns with it: log of the ratio of their times, mean over the learning rates, which they do not
-- depend on. Each ratio is of times that one process read in the same seconds.
select
    depth,
    own.placement,
    seed,
    own.mode,
    beside.placement as other,
    beside.mode as other_mode,
    any_value(clock) as clock,
    avg(ln(own.seconds)) as log_seconds,
    avg(ln(own.seconds / beside.seconds)) as log_ratio
from timing as own
join timing as beside using (trial, step, clock, images)
join planned using (trial)
join trials using (trial)
where trainable = 'all' and own.placement = trials.placement and own.seconds > 0 and beside.seconds > 0
group by depth, own.placement, seed, own.mode, other, other_mode

-- name: time_over_every
-- One row per depth, place and kind of pass: its time over that of the same kind of pass with a norm everywhere at the
-- same depth, timed in turns with it: geometric mean over seeds, with a 95 % interval.
with
-- one row per depth, place and kind of pass
over_seeds as (
    select
        depth,
        placement,
        mode,
        any_value(clock) as clock,
        count(*) as n,
        exp(avg(log_seconds)) as seconds,
        avg(log_ratio) as mean,
        stddev_samp(log_ratio) / sqrt(count(*)) as error
    from paces
    where other = 'every' and other_mode = mode
    group by depth, placement, mode
)

select
    depth || ' ' || placement as network,
    depth,
    placement,
    norms,
    mode,
    clock,
    n,
    seconds,
    exp(mean) as ratio,
    exp(mean - t95 * error) as low,
    exp(mean + t95 * error) as high
from over_seeds
left join counted using (depth, placement)
left join student using (n)
order by depth, norms desc, placement, mode

-- name: time_saved
-- One row per comparison, over all depths at which the preset has the place: time over time, geometric mean over depths
-- and seeds, with a 95 % interval. No number where that is wider than a twentieth either way: then the machine was too
-- busy to tell.
with
-- one row per comparison
asked as (
    select * from (values
        ('every_2', 'train', 'every', 'train'),
        ('every_5', 'train', 'every', 'train'),
        ('every_2', 'evaluation', 'every', 'evaluation'),
        ('every_5', 'evaluation', 'every', 'evaluation'),
        ('every', 'folded', 'none', 'evaluation'),
        ('every_2', 'folded', 'every', 'folded')
    ) as each (placement, mode, other, other_mode)
),

-- one row per comparison and seed
by_seed as (
    select placement, mode, other, seed, avg(log_ratio) as log_ratio
    from asked
    join paces using (placement, mode, other, other_mode)
    join depths_of using (placement)
    where depths_of.trainable = 'all'
    group by placement, mode, other, seed
    having count(*) = any_value(depths)
),

-- one row per comparison
over_seeds as (
    select
        placement,
        mode,
        other,
        avg(log_ratio) as mean,
        count(*) as n,
        stddev_samp(log_ratio) / sqrt(count(*)) as error
    from by_seed
    group by placement, mode, other
)

select
    placement,
    mode,
    other,
    case when exp(t95 * error) <= 1.05 then exp(mean) end as measured,
    n,
    exp(mean) as ratio,
    exp(mean - t95 * error) as low,
    exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by mode, placement

-- name: by_the_protocol
-- One row per trial of the report's section 5: its schedule on CIFAR-10 at rate 0.1, a norm everywhere. Trials that
-- something else tells apart, so that a network has several of one seed, are left out.
select trial, depth, trainable, seed, accuracy
from chosen
join planned using (trial)
join trials using (trial)
where
    data = 'cifar10'
    and label_noise = 0
    and augmentation = 'flip_shift'
    and validation <= 5000
    and trials.network = 'resnet'
    and width = 1
    and weight_init = 'he_normal'
    and output_bias = 'random'
    and norm = 'batch'
    and placement = 'every'
    and affine = 'both'
    and affine_at = 'every'
    and norm_init = 'uniform'
    and batch = 128
    and norm_batch = 128
    and epochs = 160
    and trials.lr = 0.1
    and milestones = [0.5, 0.75]
    and plateau is null
    and lr_drop = 0.1
    and warmup = 0
    and momentum = 0.9
    and weight_decay = 0.0001
    and decay_on = 'all'
    and norm_decay is null
    and (gamma_l1, gamma_l2, beta_l1, beta_l2) = (0, 0, 0, 0)
    and precision = 'fp32'
qualify count(*) over (partition by depth, trainable, seed) = 1

-- name: accuracy_on_cifar10
-- One row per trained set and depth by the report's protocol: test accuracy at the end over seeds.
with
-- one row per trained set and depth
over_seeds as (
    select
        trainable,
        depth,
        avg(accuracy) as measured,
        count(accuracy) as n,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error
    from by_the_protocol
    group by trainable, depth
)

select trainable, depth, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by trainable, depth
