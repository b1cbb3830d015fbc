-- Queries of studies/bn_capacity.py. Three tables are not the store's: `plan` has one row per trial of the preset;
-- `chosen` one row per trial with a result whose learning rate was chosen on held-out training images, with its test
-- accuracy at the end (null where it diverged); `student` the 97.5 % quantile t95 of Student's t for n readings.
-- The gap is training accuracy less test accuracy of one network at one step, in evaluation mode, on images that no
-- augmentation touched. Accuracy on training images counts the labels trained on.

-- name: planned
-- One row per trial of the preset, run or not: its data set, depth and augmentation, where that is an axis, whether its
-- labels are true, as `changed` what its batch norm has that the report's does not, nothing where it is plain, and as
-- `others` the axes that this study does not name. Where data set or depth is no axis it is that of the trials there are.
select
    trial,
    coalesce(
        nullif(regexp_extract(cell, '(^| )data=(\S+)', 2), ''),
        (select any_value(data) from plan as every join trials using (trial))
    ) as data,
    coalesce(
        nullif(regexp_extract(cell, '(^| )depth=(\S+)', 2), '')::bigint,
        (select any_value(depth) from plan as every join trials using (trial))
    ) as depth,
    regexp_extract(cell, '(^| )augmentation=(\S+)', 2) as augmented,
    regexp_extract(cell, '(^| )label_noise=(\S+)', 2) in ('', '0.0') as true_labels,
    trim(regexp_replace(
        cell,
        '(^| )(data|depth|augmentation|label_noise|trainable=(bn|all)|norm_init=uniform|affine=both|affine_at=every|(gamma|beta)_l[12]=0\.0)\b(=\S+)?',
        '',
        'g'
    )) as changed,
    trim(regexp_replace(
        cell,
        '(^| )(data|depth|trainable|augmentation|label_noise|norm_init|affine|affine_at|gamma_l1|gamma_l2|beta_l1|beta_l2)=\S+',
        '',
        'g'
    )) as others
from plan

-- name: rungs
-- One row per data set and depth of the preset, run or not: whether it is the greatest or the least depth, whether all
-- changes of batch norm are made at it, and at how many depths they are. What a claim says of "every depth", "the
-- greatest depth" and "each data set" is asked of these; one that has no result counts as no seeds.
with
-- one row per data set and depth
depths as (
    select data, depth, count(distinct nullif(changed, '')) as changes
    from planned
    group by data, depth
)

select
    data,
    depth,
    depth = max(depth) over of_data as deepest,
    depth = min(depth) over of_data as shallowest,
    changes = max(changes) over of_data as changed,
    count(*) over (partition by data, changes) as changed_depths
from depths
window of_data as (partition by data)

-- name: compared_augmentation
-- One row: the augmentation under which networks on true labels are compared, of the plan and not of what has been run
-- so far: the one with most trials.
with
-- one row per augmentation
sizes as (
    select augmented, count(*) as trials
    from planned
    where true_labels
    group by augmented
)

select first(augmented order by trials desc, augmented) as augmented
from sizes

-- name: described
-- One row per trial with a result. `kind` is what trains: `bn` stands for gamma, beta or both. `change` is what its
-- batch norm has that the report's does not, `plain` where that is nothing. Where an axis that this study does not name
-- has several values, `change` names its value, so that settings are never taken for seeds, and none of them is plain.
-- `penalty` and `strength` name a penalty on gamma or beta where that is the only change.
with
-- one row per trial
named as (
    select
        trial,
        augmented,
        if(trainable in ('bn', 'gamma', 'beta'), 'bn', trainable) as kind,
        concat_ws(
            ', ',
            if(norm_init != 'uniform' and not (affine = 'beta' and norm_init = 'ones'), 'start ' || norm_init, null),
            case affine when 'gamma' then 'no beta' when 'beta' then 'no gamma' end,
            if(affine_at != 'every', 'affine at ' || affine_at, null),
            if(trainable in ('gamma', 'beta'), 'only ' || trainable || ' trains', null),
            nullif(if((select count(distinct others) from planned) > 1, others, ''), '')
        ) as other_change,
        concat_ws(
            ', ',
            if(gamma_l1 > 0, 'gamma_l1', null),
            if(gamma_l2 > 0, 'gamma_l2', null),
            if(beta_l1 > 0, 'beta_l1', null),
            if(beta_l2 > 0, 'beta_l2', null)
        ) as penalties,
        gamma_l1 + gamma_l2 + beta_l1 + beta_l2 as strength
    from planned
    join trials using (trial)
    where outcome in ('finished', 'diverged')
)

select
    trial,
    augmented,
    kind,
    case
        when penalties = '' and other_change = '' then 'plain'
        else concat_ws(', ', nullif(other_change, ''), if(penalties = '', null, penalties || format(' {:g}', strength)))
    end as change,
    if(other_change = '' and penalties in ('gamma_l1', 'gamma_l2', 'beta_l1', 'beta_l2'), penalties, null) as penalty,
    if(other_change = '', strength, null) as strength
from named

-- name: ends
-- One row per trial that finished: accuracies at its last step, and the gap between two of them.
with
-- one row per trial: all of them of the network after its last update
last as (
    select
        trial,
        max(accuracy) filter (where split = 'train') as train,
        max(accuracy) filter (where split = 'test') as test,
        max(accuracy) filter (where split = 'validation') as held_out,
        max(images) filter (where split = 'train') as train_images,
        max(images) filter (where split = 'test') as test_images
    from curve
    join trials using (trial)
    where
        outcome = 'finished'
        and curve.step = trials.step
        and isfinite(accuracy)
    group by trial
    having train is not null and test is not null
)

select
    trial,
    data,
    data_title,
    depth,
    kind,
    change,
    penalty,
    strength,
    augmented,
    label_noise,
    lr,
    seed,
    trainable_parameters as parameters,
    train,
    test,
    held_out,
    train - test as gap,
    train_images,
    test_images,
    case data when 'digits' then 1437 when 'cifar10' then 50000 when 'cifar100' then 50000 else 60000 end
    - validation as images,
    if(data = 'cifar100', 100, 10) as classes
from last
join described using (trial)
join trials using (trial)

-- name: compared
-- One row per trial on true labels that finished, at the learning rate chosen on held-out images.
select *
from ends
where
    trial in (select trial from chosen)
    and label_noise = 0
    and augmented = (select augmented from compared_augmentation)

-- name: gap_by_depth
-- One row per data set, depth and what trains: the plain networks' accuracies and gap, with its 95 % interval over
-- seeds; `points`, `low` and `high` in percentage points. `image_error` is what so few images leave uncertain of the gap,
-- one standard error: all seeds share the images. `uncertain` is one standard error of seeds and images.
with
-- one row per data set, depth and what trains
over_seeds as (
    select
        data,
        data_title,
        depth,
        kind,
        count(*) as n,
        avg(train) as train,
        avg(test) as test,
        avg(gap) as gap,
        stddev_samp(gap) / sqrt(count(*)) as error,
        coalesce(var_samp(test) / count(*), 0) as test_variance,
        any_value(train_images) as train_images,
        any_value(test_images) as test_images
    from compared
    where change = 'plain'
    group by data, data_title, depth, kind
)

select
    data,
    data_title,
    depth,
    kind,
    n,
    train,
    test,
    gap,
    error,
    100 * gap as points,
    100 * (gap - t95 * error) as low,
    100 * (gap + t95 * error) as high,
    sqrt(train * (1 - train) / train_images + test * (1 - test) / test_images) as image_error,
    sqrt(pow(image_error, 2) + pow(coalesce(error, 0), 2)) as uncertain,
    sqrt(test * (1 - test) / test_images + test_variance) as test_uncertain
from over_seeds
left join student using (n)
order by data_title, depth, kind

-- name: over_training
-- One row per data set, depth, what trains, part of the data and share of training: accuracy of the plain networks over
-- seeds with its 95 % interval. `line` names what trains and the part, `panel` data and depth.
with
-- one row per data set, depth, line and reading
over_seeds as (
    select
        compared.data_title,
        compared.depth,
        kind || ' ' || split as line,
        curve.step / total_steps as share,
        count(*) as n,
        avg(accuracy) as accuracy,
        stddev_samp(accuracy) / sqrt(count(*)) as error
    from compared
    join curve using (trial)
    join trials using (trial)
    where
        change = 'plain'
        and split in ('train', 'test')
        and isfinite(accuracy)
    group by all
)

select
    data_title || format(', {} layers', depth) as panel,
    line,
    share,
    n,
    accuracy,
    accuracy - t95 * error as low,
    accuracy + t95 * error as high
from over_seeds
left join student using (n)
order by data_title, depth, line, share

-- name: changes_by_seed
-- One row per data set, change of batch norm and seed, the plain network among them: BN-only accuracies and gap, and
-- these less those of the plain network of the same seed, means over all depths at which the preset changes batch norm.
-- A seed that lacks one of them has no row: means over other depths do not compare.
select
    data,
    any_value(changed.data_title) as data_title,
    changed.change,
    any_value(changed.penalty) as penalty,
    any_value(changed.strength) as strength,
    seed,
    any_value(changed.train_images) as train_images,
    any_value(changed.test_images) as test_images,
    avg(changed.train) as train,
    avg(changed.test) as test,
    avg(changed.held_out) as held_out,
    avg(changed.gap) as gap,
    avg(changed.test - plain.test) as test_gain,
    avg(changed.gap - plain.gap) as gap_gain
from compared as changed
join compared as plain using (data, depth, seed)
join rungs using (data, depth)
where
    changed.kind = 'bn'
    and plain.kind = 'bn'
    and plain.change = 'plain'
    and rungs.changed
group by data, changed.change, seed
having count(*) = any_value(changed_depths)

-- name: changes
-- One row per data set and change of batch norm: BN-only accuracies and gap over seeds, and what the change makes of
-- the plain network's, with 95 % intervals over seeds. `gap_gain_errors` and `test_gain_errors` are these by their
-- standard error, of seeds and of images: what the images leave uncertain is added as if two networks erred on images
-- that have nothing to do with each other, which is the most it can be while they err on like images.
with
-- one row per data set and change
over_seeds as (
    select
        data,
        any_value(data_title) as data_title,
        change,
        any_value(penalty) as penalty,
        any_value(strength) as strength,
        count(*) as n,
        avg(train) as train,
        avg(test) as test,
        avg(held_out) as held_out,
        avg(gap) as gap,
        stddev_samp(gap) / sqrt(count(*)) as gap_error,
        avg(gap_gain) as gap_gain,
        stddev_samp(gap_gain) / sqrt(count(*)) as gap_gain_error,
        avg(test_gain) as test_gain,
        stddev_samp(test_gain) / sqrt(count(*)) as test_gain_error,
        avg(train) * (1 - avg(train)) / any_value(train_images) as train_variance,
        avg(test) * (1 - avg(test)) / any_value(test_images) as test_variance
    from changes_by_seed
    group by data, change
),

-- one row per data set and change: beside it the plain network's
beside_plain as (
    select
        changed.*,
        sqrt(pow(coalesce(changed.test_gain_error, 0), 2) + changed.test_variance + plain.test_variance) as test_uncertain,
        sqrt(
            pow(coalesce(changed.gap_gain_error, 0), 2)
            + changed.train_variance + changed.test_variance + plain.train_variance + plain.test_variance
        ) as gap_uncertain
    from over_seeds as changed
    join over_seeds as plain using (data)
    where plain.change = 'plain'
)

select
    data,
    data_title,
    change,
    penalty,
    strength,
    n,
    train,
    test,
    held_out,
    gap,
    gap - t95 * gap_error as gap_low,
    gap + t95 * gap_error as gap_high,
    gap_gain,
    gap_gain - t95 * gap_gain_error as gap_gain_low,
    gap_gain + t95 * gap_gain_error as gap_gain_high,
    if(gap_uncertain > 0, gap_gain / gap_uncertain, 0) as gap_gain_errors,
    test_gain,
    test_gain - t95 * test_gain_error as test_gain_low,
    test_gain + t95 * test_gain_error as test_gain_high,
    if(test_uncertain > 0, test_gain / test_uncertain, 0) as test_gain_errors
from beside_plain
left join student using (n)
order by data_title, change != 'plain', penalty is null, penalty, strength, change

-- name: gap_by_change
-- One row per data set and change of batch norm: the gap of BN only, means over depths, in percentage points.
select data_title, change, n, 100 * gap as points, 100 * gap_low as low, 100 * gap_high as high
from changes

-- name: test_by_change
-- One row per data set and change of batch norm, the plain one left out: what it adds to BN-only test accuracy, in
-- percentage points.
select data_title, change, n, 100 * test_gain as points, 100 * test_gain_low as low, 100 * test_gain_high as high
from changes
where change != 'plain'

-- name: memorised
-- One row per trial for random labels that finished: how many of its training labels it has right beyond what it would
-- of as many images that it never saw, with labels as noisy. Of those, one in `classes` of the labels drawn anew is
-- right by chance, and of the others as many as of the test images. On labels that are all random it is accuracy above
-- chance times training images; on true labels it is the gap times these. There is no choice of a rate: true labels are
-- shown at the one that random labels are learned at, and where these have several, none is shown.
with
-- one row: what networks on noisy labels are trained with
protocol as (
    select any_value(augmented) as augmented, any_value(lr) as lr
    from ends
    where label_noise > 0
    having count(distinct lr) = 1 and count(distinct augmented) = 1
)

select
    ends.*,
    train - (label_noise / classes + (1 - label_noise) * test) as beyond,
    images * (train - (label_noise / classes + (1 - label_noise) * test)) as labels
from ends
join protocol using (augmented, lr)
where change = 'plain'

-- name: memorised_by_depth
-- One row per data set, depth, what trains and share of random labels: labels memorised, over seeds with its 95 %
-- interval. `beyond` is their share of the training images, `uncertain` one standard error of it, of seeds and of the
-- images looked at, `per_parameter` their number by that of what trains.
with
-- one row per data set, depth, what trains and share of random labels
over_seeds as (
    select
        data,
        data_title,
        depth,
        kind,
        label_noise,
        any_value(parameters) as parameters,
        any_value(images) as images,
        count(*) as n,
        avg(train) as train,
        avg(test) as test,
        avg(beyond) as beyond,
        stddev_samp(beyond) / sqrt(count(*)) as error,
        avg(train) * (1 - avg(train)) / any_value(train_images)
        + pow(1 - label_noise, 2) * avg(test) * (1 - avg(test)) / any_value(test_images) as image_variance
    from memorised
    group by data, data_title, depth, kind, label_noise
)

select
    data,
    data_title,
    depth,
    kind,
    label_noise,
    kind || format(' {:g}', label_noise) as line,
    n,
    parameters,
    images,
    train,
    test,
    beyond,
    beyond - t95 * error as beyond_low,
    beyond + t95 * error as beyond_high,
    sqrt(image_variance + pow(coalesce(error, 0), 2)) as uncertain,
    images * beyond as labels,
    images * (beyond - t95 * error) as low,
    images * (beyond + t95 * error) as high,
    images * beyond / parameters as per_parameter
from over_seeds
left join student using (n)
order by data_title, depth, kind, label_noise

-- name: memorised_by_parameters
-- One row per data set, what trains, share of random labels and number of parameters that train: labels memorised.
select data_title, line, parameters, depth, n, labels, low, high, per_parameter
from memorised_by_depth
where parameters is not null and label_noise > 0
order by data_title, line, parameters

-- name: random_labels
-- One row per data set, depth of the preset and what trains: the networks on labels that are all random, `n` = 0 and no
-- numbers where there is none.
select
    rungs.data,
    rungs.depth,
    deepest,
    shallowest,
    kinds.kind,
    coalesce(n, 0) as n,
    train,
    beyond,
    beyond_low,
    beyond_high,
    uncertain,
    labels,
    per_parameter
from rungs
cross join (values ('bn'), ('all')) as kinds (kind)
left join memorised_by_depth as known
    on (known.data, known.depth, known.kind, known.label_noise) = (rungs.data, rungs.depth, kinds.kind, 1)

-- name: learned_to_the_end
-- One row, and none unless the networks trained whole have 95 % of the random labels right at every depth of the preset
-- and on each data set. Before that, what has been memorised says how fast a network learns and not how much it holds.
select min(train) as least
from random_labels
where kind = 'all'
having count(train) = count(*) and min(train) >= 0.95

-- name: overfits
-- One row: the gap of BN only at the greatest depth by its standard error, of images and seeds, on the data set where
-- that is least.
select
    min(if(uncertain > 0, gap / uncertain, 0)) as measured,
    min(coalesce(n, 0)) as n,
    arg_min(data_title, gap / uncertain) as data_title,
    arg_min(gap, gap / uncertain) as gap
from rungs
left join gap_by_depth as bn on (bn.data, bn.depth, bn.kind) = (rungs.data, rungs.depth, 'bn')
where deepest

-- name: whole_overfits_more
-- One row: the gap of the network trained whole less that of BN only by its standard error, of images and seeds, where
-- that is least over data sets and depths.
with
-- one row per data set and depth
differences as (
    select
        whole.gap - bn.gap as difference,
        sqrt(pow(whole.uncertain, 2) + pow(bn.uncertain, 2)) as uncertain,
        least(coalesce(whole.n, 0), coalesce(bn.n, 0)) as n
    from rungs
    left join gap_by_depth as whole on (whole.data, whole.depth, whole.kind) = (rungs.data, rungs.depth, 'all')
    left join gap_by_depth as bn on (bn.data, bn.depth, bn.kind) = (rungs.data, rungs.depth, 'bn')
)

select
    min(if(uncertain > 0, difference / uncertain, 0)) as measured,
    min(n) as n,
    arg_min(difference, difference / uncertain) as difference
from differences

-- name: gains_over_the_ladder
-- One row per quantity of BN only, its gap and its test accuracy: at the greatest depth less at the least by its
-- standard error, of images and seeds, on the data set where that is least. No row where there is one depth.
with
-- one row per data set and quantity
gains as (
    select
        unnest(['gap', 'test']) as quantity,
        unnest([deep.gap - shallow.gap, deep.test - shallow.test]) as gain,
        unnest([
            sqrt(pow(deep.uncertain, 2) + pow(shallow.uncertain, 2)),
            sqrt(pow(deep.test_uncertain, 2) + pow(shallow.test_uncertain, 2))
        ]) as uncertain,
        least(coalesce(deep.n, 0), coalesce(shallow.n, 0)) as n,
        deep.data_title
    from rungs as top
    join rungs as bottom using (data)
    left join gap_by_depth as deep on (deep.data, deep.depth, deep.kind) = (top.data, top.depth, 'bn')
    left join gap_by_depth as shallow on (shallow.data, shallow.depth, shallow.kind) = (bottom.data, bottom.depth, 'bn')
    where top.deepest and bottom.shallowest and top.depth > bottom.depth
)

select
    quantity,
    min(if(uncertain > 0, gain / uncertain, 0)) as measured,
    min(n) as n,
    arg_min(gain, gain / uncertain) as gain,
    arg_min(data_title, gain / uncertain) as data_title
from gains
group by quantity

-- name: penalties
-- One row per penalty on gamma or beta: what it adds to the gap of BN only by its standard error, of images and seeds,
-- at the strength that is best on held-out images, on the data set where that is most. Without held-out images there is
-- a number only where there is one strength.
with
-- one row per data set and penalty
picked as (
    select *
    from changes
    where penalty is not null
    qualify
        row_number() over (partition by data, penalty order by held_out desc nulls last, strength) = 1
        and (held_out is not null or count(*) over (partition by data, penalty) = 1)
),

-- one row per penalty and data set of the preset
asked as (
    select distinct penalty, rungs.data
    from picked, rungs
)

select
    penalty,
    max(gap_gain_errors) as measured,
    min(coalesce(n, 0)) as n,
    arg_max(strength, gap_gain_errors) as strength,
    arg_max(gap_gain, gap_gain_errors) as gap_gain,
    arg_max(test_gain, gap_gain_errors) as test_gain,
    arg_max(data_title, gap_gain_errors) as data_title
from asked
left join picked using (penalty, data)
group by penalty

-- name: best_change
-- One row: what the change of batch norm that is best on held-out images adds to BN-only test accuracy by its standard
-- error, of images and seeds, on the data set where that is least.
with
-- one row per data set
picked as (
    select *
    from changes
    where change != 'plain' and held_out is not null
    qualify row_number() over (partition by data order by held_out desc, change) = 1
)

select
    min(test_gain_errors) as measured,
    min(coalesce(n, 0)) as n,
    arg_min(change, test_gain_errors) as change,
    arg_min(test_gain, test_gain_errors) as test_gain,
    arg_min(gap_gain, test_gain_errors) as gap_gain,
    arg_min(data_title, test_gain_errors) as data_title
from rungs
left join picked using (data)

-- name: gamma_over_beta
-- One row: test accuracy with gamma alone trained less that with beta alone trained, seed by seed and as a mean over
-- depths, by its standard error, of images and seeds, on the data set where that is least.
with
-- one row per data set
leads as (
    select
        data,
        any_value(gamma.data_title) as data_title,
        count(*) as n,
        avg(gamma.test - beta.test) as lead,
        sqrt(
            coalesce(var_samp(gamma.test - beta.test) / count(*), 0)
            + (avg(gamma.test) * (1 - avg(gamma.test)) + avg(beta.test) * (1 - avg(beta.test)))
            / any_value(gamma.test_images)
        ) as uncertain
    from changes_by_seed as gamma
    join changes_by_seed as beta using (data, seed)
    where gamma.change = 'only gamma trains' and beta.change = 'only beta trains'
    group by data
)

select
    min(if(uncertain > 0, lead / uncertain, 0)) as measured,
    min(coalesce(n, 0)) as n,
    arg_min(lead, lead / uncertain) as lead,
    arg_min(data_title, lead / uncertain) as data_title
from rungs
left join leads using (data)

-- name: memorises
-- One row: the share of random labels that the deepest network of BN only has right beyond chance, with a 95 % interval
-- over seeds, on the data set where that is least.
select
    min(beyond) as measured,
    min(n) as n,
    arg_min(beyond_low, beyond) as low,
    arg_min(beyond_high, beyond) as high,
    arg_min(labels, beyond) as labels,
    arg_min(per_parameter, beyond) as per_parameter,
    arg_min(data, beyond) as data
from random_labels
where kind = 'bn' and deepest

-- name: memorised_steps
-- One row: what a step of the depth ladder adds to the share of random labels that BN only memorises by its standard
-- error, of images and seeds, at the step and on the data set where that is least.
with
-- one row per data set and depth
steps as (
    select
        beyond - lag(beyond) over ladder as gain,
        sqrt(pow(uncertain, 2) + pow(lag(uncertain) over ladder, 2)) as uncertain,
        least(n, lag(n) over ladder) as n,
        lag(depth) over ladder as before
    from random_labels
    cross join learned_to_the_end
    where kind = 'bn'
    window ladder as (partition by data order by depth)
)

select
    min(if(uncertain > 0, gain / uncertain, 0)) as measured,
    min(n) as n,
    arg_min(gain, gain / uncertain) as gain
from steps
where before is not null

-- name: memorised_gain
-- One row: the share of random labels that BN only memorises at the greatest depth less at the least, with what two
-- standard errors of images and seeds leave uncertain, on the data set where that is least.
with
-- one row per data set
ladder as (
    select
        data,
        top.beyond - bottom.beyond as gain,
        2 * sqrt(pow(top.uncertain, 2) + pow(bottom.uncertain, 2)) as margin,
        top.labels / bottom.labels as factor,
        least(top.n, bottom.n) as n
    from random_labels as top
    join random_labels as bottom using (data, kind)
    cross join learned_to_the_end
    where kind = 'bn' and top.deepest and bottom.shallowest and top.depth > bottom.depth
)

select
    min(gain) as measured,
    min(n) as n,
    arg_min(gain - margin, gain) as low,
    arg_min(gain + margin, gain) as high,
    arg_min(factor, gain) as factor,
    arg_min(data, gain) as data
from ladder

-- name: whole_memorises_more
-- One row: the share of random labels that the network trained whole memorises less that of BN only by its standard
-- error, of images and seeds, where that is least over data sets and depths.
with
-- one row per data set and depth
differences as (
    select
        whole.beyond - bn.beyond as difference,
        sqrt(pow(whole.uncertain, 2) + pow(bn.uncertain, 2)) as uncertain,
        least(whole.n, bn.n) as n
    from random_labels as whole
    join random_labels as bn using (data, depth)
    cross join learned_to_the_end
    where whole.kind = 'all' and bn.kind = 'bn'
)

select
    min(if(uncertain > 0, difference / uncertain, 0)) as measured,
    min(n) as n,
    arg_min(difference, difference / uncertain) as difference
from differences

-- name: fitted_on_cifar10
-- One row: accuracy of 200 layers trained whole on random labels of CIFAR-10 by the report's schedule and without
-- augmentation. Trials that something else tells apart, so that there are several of one seed, are left out.
with
-- one row per trial
by_the_protocol as (
    select train, seed
    from memorised
    join trials using (trial, seed)
    where
        trials.data = 'cifar10'
        and trials.label_noise = 1
        and augmentation = 'none'
        and validation <= 5000
        and trials.network = 'resnet'
        and trials.depth = 200
        and width = 1
        and weight_init = 'he_normal'
        and output_bias = 'random'
        and norm = 'batch'
        and placement = 'every'
        and affine = 'both'
        and affine_at = 'every'
        and norm_init = 'uniform'
        and trainable = 'all'
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
    qualify count(*) over (partition by seed) = 1
)

select avg(train) as measured, count(*) as n
from by_the_protocol
having count(*) > 0
